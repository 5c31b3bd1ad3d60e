"""A teacher that reads the student's text behind another prompt: what it knows besides shows in its scores of the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.core import Columns, Endpoint, ScoreRequest, Stage
from strategies.stages.rollout import LONGEST_ROW
from strategies.stages.score import Score

REFERENCE = "{reference}"
"""Stands in a context's text for the row's own completion in the data."""
ROW = ("tokens", "lengths", "loss_mask")
"""Columns that say what a row reads like."""


@dataclass(frozen=True)
class Context:
    """What a teacher reads before a row: ids of the text before `{reference}`, the reference, ids of the text after it.

    Rows of chat messages are ids already, with their template: there the context comes before the first turn.
    """

    text: str
    """`""` shows the rows as they are; without `{reference}` it says the same of every row."""
    before: tuple[int, ...] = ()
    """Ids of the text before `{reference}`; these and those below are known to whoever runs the strategy."""
    between: tuple[int, ...] = ()
    """Ids of the text after it."""
    opening: tuple[int, ...] = ()
    """Ids that a text begins with, such as BOS: they stay before the context."""
    endings: tuple[int, ...] = ()
    """Ids that end a text: they end no reference that something follows."""
    longest_tokens: int = LONGEST_ROW
    """Of a row with its context: the positions of the teacher."""

    @property
    def shows_reference(self) -> bool:
        return REFERENCE in self.text

    def row(self, tokens: NDArray[np.generic], reference: NDArray[np.generic]) -> NDArray[np.generic] | None:
        """The row behind its context; None without the reference that it should show, and where there is no room."""
        size = len(reference)
        while size and int(reference[size - 1]) in self.endings:
            size -= 1
        if self.shows_reference and not size:
            return None
        first = len(self.opening) if tuple(tokens[: len(self.opening)].tolist()) == self.opening else 0
        known = (reference[:size],) if self.shows_reference else ()
        whole = np.concatenate([tokens[:first], np.asarray(self.before), *known, np.asarray(self.between), tokens[first:]])
        return whole.astype(tokens.dtype) if len(whole) <= self.longest_tokens else None


@dataclass(frozen=True)
class ScoreBehind:
    """Score by a teacher that reads every row behind a context. Its answers are about the same N loss tokens, in the same order.

    A context with a reference is for rows that the student wrote: another row's completion is the reference itself, which a teacher
    that has just read it only repeats. So `weights/<term>` (N,) float32 is 0 on rows that nobody wrote, that have no reference, and
    that are too long behind it; an earlier `weights/<term>` is multiplied. Those rows, and held-out rows (`step` 0), are read as they
    are. Never shows one text of the student to the teacher of another.

    Adds what `Score` adds, `weights/<term>`, and `<signal>/left_out` (1,) float32: written rows of weight 0.
    """

    signal: str
    endpoint: str
    request: ScoreRequest
    term: str
    context: Context

    @property
    def needs(self) -> frozenset[str]:
        return self._score.needs | {"written", "reference", "reference_lengths", "step"}

    @property
    def adds(self) -> frozenset[str]:
        return self._score.adds | {f"weights/{self.term}", f"{self.signal}/left_out"}

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        rows = list(self._rows(columns))
        shown = {
            "tokens": np.concatenate([np.zeros(0, np.int32), *(r.tokens for r in rows)]),
            "lengths": np.asarray([len(r.tokens) for r in rows], dtype=np.int32),
            "loss_mask": np.concatenate([np.zeros(0, np.uint8), *(r.loss_mask for r in rows)]),
        }
        scored = self._score({**columns, **shown}, endpoint)
        counts = [int(np.count_nonzero(r.loss_mask)) for r in rows]
        weights = np.repeat(np.asarray([r.counts for r in rows], dtype=np.float32), counts)
        name = f"weights/{self.term}"
        left_out = sum(not r.counts for r, w in zip(rows, columns["written"], strict=True) if w)
        return {
            **scored,
            **{n: columns[n] for n in ROW},
            name: columns[name].astype(np.float32) * weights if name in columns else weights,
            f"{self.signal}/left_out": np.asarray([left_out], dtype=np.float32),
        }

    @property
    def _score(self) -> Score:
        return Score(self.signal, self.endpoint, self.request)

    def _rows(self, columns: Columns) -> Iterator[_Shown]:
        """The rows as the teacher reads them."""
        ends, known = np.cumsum(columns["lengths"].astype(np.int64)), np.cumsum(columns["reference_lengths"].astype(np.int64))
        bare = int(columns["step"][0]) == 0 or not self.context.text
        for i, written in enumerate(columns["written"].astype(bool).tolist()):
            part = slice(int(ends[i] - columns["lengths"][i]), int(ends[i]))
            tokens, mask = columns["tokens"][part], columns["loss_mask"][part]
            reference = columns["reference"][int(known[i] - columns["reference_lengths"][i]) : int(known[i])]
            usable = not bare and (written or not self.context.shows_reference)
            whole = self.context.row(tokens, reference) if usable else None
            if whole is None:
                yield _Shown(tokens, mask, bare)
            else:
                yield _Shown(whole, np.concatenate([np.zeros(len(whole) - len(tokens), mask.dtype), mask]), True)


@dataclass(frozen=True)
class _Shown:
    """A row as the teacher reads it, and whether its answer counts."""

    tokens: NDArray[np.generic]
    loss_mask: NDArray[np.generic]
    counts: bool


def behind(stages: tuple[Stage, ...]) -> list[ScoreBehind]:
    """Those of `stages` whose teacher reads a context."""
    return [s for s in stages if isinstance(s, ScoreBehind)]
