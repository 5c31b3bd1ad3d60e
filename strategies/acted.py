"""Acted: what is known of tokens that a policy wrote, one number of each kind per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from strategies.core import Reads
from strategies.signals import Scarce, Signal, given

if TYPE_CHECKING:
    from strategies.head import TokenLogits


@dataclass(frozen=True)
class Acted(Scarce):
    """Tokens as actions of the policy that wrote them. Every column is `(N,)` float32 and carries no gradient; logarithms are
    natural ones at temperature 1, so what objectives make of them holds for text that was drawn at temperature 1.

    What nobody measured is None, and an objective that reads it refuses (`known`). The teacher's column makes it a signal of
    single log-probabilities too, as `PerToken` is.
    """

    behaviour: Tensor
    """Log-probability of the token under whatever wrote it: the student's weights of that time."""
    teacher: Tensor | None = None
    """log p of the token."""
    reference: Tensor | None = None
    """log b of the token: the student's first weights, or the teacher before it was trained."""
    advantage: Tensor | None = None
    """A verifier's advantage of the token, normalised within its group; that of its row on every token, as a rule."""
    reward: Tensor | None = None
    """A verifier's reward of the token's row, 0 to 1."""
    group_failed: Tensor | None = None
    """1 where no text of the token's group was right, else 0."""

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"acted"} if self.teacher is None else {"acted", "label"})

    def chunk(self, start: int, stop: int) -> Acted:
        return self._each(lambda column: column[start:stop])

    def where(self, live: Tensor) -> Acted:
        """The same with 0 in every column of the tokens where `live` `(N,)` bool is False, whatever stood there."""
        return self._each(lambda column: torch.where(live, column, 0.0))

    def label_logprobs(self, outputs: TokenLogits) -> Tensor:
        return super().label_logprobs(outputs) if self.teacher is None else self.teacher.detach().float()

    def known(self, column: str, reader: str) -> Tensor:
        """The column so called; `ValueError` when nobody measured it. `reader` names who asked."""
        found = getattr(self, column)
        if isinstance(found, Tensor):
            return found
        there = ", ".join(f.name for f in fields(self) if getattr(self, f.name) is not None)
        raise ValueError(f"{reader} reads {column!r} of written tokens, and the signal has {there}; expected a source that carries it")

    def _each(self, change: Callable[[Tensor], Tensor]) -> Acted:
        there = {f.name: column for f in fields(self) if isinstance(column := getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(column.detach()) for name, column in there.items()})


def acted(signal: Signal | None, reader: str) -> Acted:
    """`signal` as what is known of written tokens; `ValueError` when it is something else."""
    return cast(Acted, given(signal, "acted", reader))
