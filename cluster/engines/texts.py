"""What writers are asked for and how they answer: one text for every row and sample, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.answers import mixed_keys
from cluster.engines import Columns, Sampling
from cluster.forwards import Ints


@dataclass(frozen=True)
class Text:
    """One written text."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finished: bool


NOTHING = Text(np.zeros(0, np.int32), np.zeros(0, np.float32), False)


@dataclass(frozen=True)
class Asked:
    """The T = R * samples texts that are asked for: rows in order, then samples."""

    prompts: Sequence[NDArray[Any]]
    """`(T,)`, each of at least one token."""
    limits: Ints
    """`(T,)` most tokens of each."""
    row_id: Ints
    sample: Ints
    keys: Ints
    """`(T,)` seeds, which belong to a text and not to its bundle."""

    def columns(self, texts: Sequence[Text]) -> Columns:
        """See `cluster.engines.Writer.write`."""
        return {
            "tokens": np.concatenate([NOTHING.tokens, *(t.tokens for t in texts)]),
            "lengths": np.asarray([len(t.tokens) for t in texts], dtype=np.int32),
            "row_id": self.row_id,
            "sample": self.sample.astype(np.int32),
            "finished": np.asarray([t.finished for t in texts], dtype=np.uint8),
            "logprobs": np.concatenate([NOTHING.logprobs, *(t.logprobs for t in texts)]),
        }


def asked_texts(columns: Columns, sampling: Sampling) -> Asked:
    """`ValueError` for an empty prompt, and for limits that fit no rows."""
    lengths = columns["lengths"].astype(np.int64)
    if len(lengths) and lengths.min() == 0:
        raise ValueError("prompts: got an empty one; expected at least one token to go on from")
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(lengths)), sampling.samples)
    prompts = [columns["tokens"][end - size : end] for end, size in zip(ends[row], lengths[row], strict=True)]
    sample = np.tile(np.arange(sampling.samples), len(lengths))
    row_id = columns["row_id"].astype(np.int64)[row]
    return Asked(prompts, _limits(columns, sampling)[row], row_id, sample, mixed_keys(sampling.seed, row_id, sample))


def _limits(columns: Columns, sampling: Sampling) -> Ints:
    """`(R,)` most tokens of each row's texts."""
    most = np.full(len(columns["lengths"]), sampling.max_new_tokens, dtype=np.int64)
    own = columns.get("max_new_tokens", most).astype(np.int64)
    if len(own) != len(most) or own.min(initial=1) < 1:
        raise ValueError(f"max_new_tokens: got {len(own)} limits from {own.min(initial=1)}; expected {len(most)} of at least 1")
    return np.minimum(most, own)
