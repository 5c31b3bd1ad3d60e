"""What is added to vLLM's workers: logits of usable ids alone, and how much probability the others had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024
"""Rows of logits that exist in float32 at one time."""


class UsableIds:
    """A part of vLLM's worker (`worker_extension_cls`), which has `model_runner`."""

    model_runner: Any
    _dropped_mass: Tensor | None

    def keep_usable(self, usable: int) -> None:
        """From now on the model gives ids from `usable` on no probability. Call it once."""
        model = self.model_runner.get_model()
        model.compute_logits = narrowed(model.compute_logits, usable, self._note_dropped)

    def take_dropped(self) -> float:
        """The largest probability that one token had on other ids since this was asked last."""
        found = getattr(self, "_dropped_mass", None)
        self._dropped_mass = None
        return 0.0 if found is None else float(found)

    def _note_dropped(self, mass: Tensor) -> None:
        """`mass` is a number on the device; nobody waits for it until it is asked for."""
        before = getattr(self, "_dropped_mass", None)
        self._dropped_mass = mass if before is None else torch.maximum(before, mass)


def narrowed(compute: Callable[..., Tensor | None], usable: int, note: Callable[[Tensor], None]) -> Callable[..., Tensor | None]:
    """`compute` without the ids from `usable` on; `note` hears the largest probability that they had."""

    def compute_usable(*args: Any, **kwargs: Any) -> Tensor | None:
        logits = compute(*args, **kwargs)
        if logits is None:  # on tensor-parallel ranks that do not sample
            return None
        for rows in logits.split(ROWS_AT_ONCE):
            if len(rows):
                foreign, kept = (part.float().logsumexp(-1) for part in (rows[:, usable:], rows[:, :usable]))
                note(torch.sigmoid(foreign - kept).max())
        logits[:, usable:] = -torch.inf
        return logits

    return compute_usable
