"""Which row is read when: a pure function of seed and step, the same for any number of workers.

Shuffling is a keyed bijection of row numbers, so an order over any number of rows and steps takes no memory. The rows
of a step are dealt to its bundles by length, so that bundles of one step are equal work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from orchestrator.rows import Rows

if TYPE_CHECKING:
    from orchestrator.draws import Draws

_ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """The order of one run. Exactly one of `batch_rows` and `batch_tokens` is positive."""

    folder: str
    """Prepared data."""
    seed: int
    steps: int
    bundles_per_step: int
    batch_rows: int = 0
    batch_tokens: int = 0
    last_row: int | None = None
    """Position in the stream of all epochs at which the run ends; the last step may be smaller."""
    elastic: bool = False
    """Whether fewer workers may share the bundles of a step."""
    draws: Draws | None = None
    """A curriculum, which decides what each step draws; `batch_rows` is positive then."""

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """Row numbers of optimizer step `step` (from 1), in stream order, `(R,)`."""
        if self.batch_tokens:
            return self._step_rows_by_tokens(step)
        first = (step - 1) * self.batch_rows
        end = first + self.batch_rows if self.last_row is None else min(first + self.batch_rows, self.last_row)
        return rows_at(np.arange(first, end), len(self._rows), self.seed)

    def bundles(self, step: int) -> list[NDArray[np.int64]]:
        """Row numbers of each bundle of a step: dealt longest first, back and forth, so that token counts are close."""
        return deal(self.step_rows(step), self._rows.lengths, self.bundles_per_step)

    def take(self, step: int, values: Mapping[str, float], cursor: Mapping[str, float]) -> tuple[list[NDArray[np.int64]], dict[str, float]]:
        """Row numbers of each bundle of a step, and where a curriculum stands behind it. It reads `values` of controllers, and goes on
        from `cursor`; without one, neither matters."""
        if self.draws is None:
            return self.bundles(step), {}
        rows, after = self.draws.take(self.folder, self.seed, step, self.batch_rows, values, cursor)
        return deal(rows, self._rows.lengths, self.bundles_per_step), after

    def example(self, step: int) -> list[NDArray[np.int64]]:
        """Bundles such as a step may have; without a curriculum, those of the step."""
        if self.draws is None:
            return self.bundles(step)
        return deal(self.draws.example(self.folder, self.seed, step, self.batch_rows), self._rows.lengths, self.bundles_per_step)

    def count_steps(self, epochs: float) -> int:
        """Optimizer steps in so many passes over the data."""
        if not self.batch_tokens:
            return -(-round(epochs * len(self._rows)) // self.batch_rows)
        whole, part = int(epochs), epochs - int(epochs)
        steps = sum(self._epoch_steps(e) for e in range(whole))
        return steps + round(part * self._epoch_steps(whole)) if part else steps

    def about_rows(self, mean_tokens: float) -> float:
        """Rows of the whole run, where the data's have so many tokens on average."""
        return self.steps * (self.batch_tokens / mean_tokens if self.batch_tokens else self.batch_rows)

    @property
    def _rows(self) -> Rows:
        return _open(self.folder)

    def _step_rows_by_tokens(self, step: int) -> NDArray[np.int64]:
        epoch, offset = 0, step - 1
        while offset >= (steps := self._epoch_steps(epoch)):
            offset -= steps
            epoch += 1
        first, end = self._token_steps(epoch)[offset : offset + 2]
        rows = len(self._rows)
        return rows_at(np.arange(first, end) + epoch * rows, rows, self.seed)

    def _epoch_steps(self, epoch: int) -> int:
        return _epoch_steps(self.folder, self.seed, self.batch_tokens, epoch)

    def _token_steps(self, epoch: int) -> NDArray[np.int64]:
        return _token_steps(self.folder, self.seed, self.batch_tokens, epoch)


def rows_at(positions: NDArray[np.int64], rows: int, seed: int) -> NDArray[np.int64]:
    """Row numbers at stream positions; every epoch of `rows` positions visits each row once, in its own order."""
    epochs = positions // rows
    out = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permuted(positions[here] - epoch * rows, rows, (seed * 1_000_003 + int(epoch)) & _MASK)
    return out


def deal(rows: NDArray[np.int64], lengths: NDArray[np.int32], bundles: int) -> list[NDArray[np.int64]]:
    """Splits rows into `bundles` parts of nearly equal tokens; a pure function of the rows."""
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    turn = np.arange(len(rows)) % (2 * bundles)
    owner = np.where(turn < bundles, turn, 2 * bundles - 1 - turn)
    return [by_length[owner == b] for b in range(bundles)]


_MASK = (1 << 64) - 1


def _permuted(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Image of `index` under a keyed bijection of `range(size)`: a Feistel network, walked until it lands inside."""
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [_mix(np.uint64((key + 0x9E3779B97F4A7C15 * (r + 1)) & _MASK)) for r in range(_ROUNDS)]

    def network(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> np.uint64(half), values & low
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & low)
        return (left << np.uint64(half)) | right

    out = network(index.astype(np.uint64))
    while (outside := out >= np.uint64(size)).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def _mix(values: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection of 64-bit words that spreads every input bit."""
    with np.errstate(over="ignore"):
        v = np.asarray(values, dtype=np.uint64)
        v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return v ^ (v >> np.uint64(31))


@lru_cache(maxsize=4)
def _open(folder: str) -> Rows:
    return Rows(folder, "train")


@cache
def _epoch_steps(folder: str, seed: int, batch_tokens: int, epoch: int) -> int:
    """Steps of one epoch: a number, which is kept of all epochs, while positions are kept of the latest."""
    return len(_token_steps(folder, seed, batch_tokens, epoch)) - 1


@lru_cache(maxsize=4)
def _token_steps(folder: str, seed: int, batch_tokens: int, epoch: int) -> NDArray[np.int64]:
    """Positions within one epoch at which steps of at most `batch_tokens` begin, and the end, `(steps + 1,)`."""
    rows = _open(folder)
    order = rows_at(np.arange(len(rows)) + epoch * len(rows), len(rows), seed)
    ends = np.cumsum(rows.lengths[order], dtype=np.int64)
    starts, begun = [0], np.int64(0)
    while starts[-1] < len(order):
        fits = int(np.searchsorted(ends, begun + batch_tokens, side="right"))
        starts.append(max(fits, starts[-1] + 1))
        begun = ends[starts[-1] - 1]
    return np.asarray(starts, dtype=np.int64)
