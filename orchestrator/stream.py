"""A worker's end of the stream: asks for the first bundle at once and asserts that it gets what is its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.bundle import HELD_OUT_STEP, from_table, scalar
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from strategies.core import Columns


@dataclass(frozen=True)
class Part:
    """Which bundles are a rank's own: those whose number it is, modulo the ranks."""

    rank: int
    world: int
    per_step: int
    """Bundles of a step; at least as many as there are ranks. Held-out rows come in multiples of it, so that a step's first bundle has
    a multiple of it as its number."""

    def last_of_step(self, number: int) -> bool:
        """Whether this rank has no later bundle of the same step."""
        return number % self.per_step + self.world >= self.per_step


class Stream:
    """Bundles of one rank in order. Creating it starts the reader and the teachers, before anything is loaded here."""

    def __init__(self, shard: Any, part: Part, read_ahead_bundles: int, rows_seconds: float | None = None):
        blocks = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=read_ahead_bundles)
        self._blocks = iter(blocks)
        self._part = part
        self._due = part.rank
        self._patience = rows_seconds
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._next: Future[Columns | None] = self._pool.submit(self._take)
        self._attempt: int | None = None
        self.waited_seconds = 0.0
        """Time the bundles of the last step were waited for."""

    @property
    def attempt(self) -> int:
        """The attempt that this stream belongs to; waits for its first bundle."""
        if self._attempt is None:
            first = self._peek()
            if first is None:
                raise RunFailed("the stream is empty")
            self._attempt = scalar(first, "attempt")
        return self._attempt

    def held_out(self) -> Iterator[tuple[int, Columns]]:
        """The held-out bundles that come next, by number: after the first step's, unless they were scored before."""
        while (bundle := self._peek()) is not None and scalar(bundle, "step") == HELD_OUT_STEP:
            self._pop()
            yield scalar(bundle, "bundle"), bundle

    def after(self, step: int, last: int) -> Iterator[list[Columns]]:
        """This rank's bundles of each step up to `last`; the first must be of `step + 1`, and each next ones of the next step."""
        while step < last and (bundle := self._pop()) is not None:
            step += 1
            bundles, waited = [bundle], self.waited_seconds
            while not self._part.last_of_step(scalar(bundles[-1], "bundle")) and (bundle := self._pop()) is not None:
                bundles.append(bundle)
                waited += self.waited_seconds
            for each in bundles:
                if scalar(each, "step") != step:
                    raise RunFailed(f"the stream gave step {scalar(each, 'step')} where the checkpoint calls for {step}")
            self.waited_seconds = waited
            yield bundles

    def _peek(self) -> Columns | None:
        try:
            return self._next.result(self._patience)
        except TimeoutError:
            raise RunFailed(f"no rows came for {self._patience:g} seconds: somebody before the training workers hangs") from None

    def _pop(self) -> Columns | None:
        began = time.perf_counter()
        bundle = self._peek()
        self.waited_seconds = time.perf_counter() - began
        if bundle is None:
            return None
        if self._attempt is None:
            self._attempt = scalar(bundle, "attempt")
        self._next = self._pool.submit(self._take)
        self._check(bundle)
        return bundle

    def _take(self) -> Columns | None:
        block = next(self._blocks, None)
        return None if block is None else from_table(block)

    def _check(self, bundle: Columns) -> None:
        number, attempt = scalar(bundle, "bundle"), scalar(bundle, "attempt")
        if (number, attempt) != (self._due, self._attempt):
            due = f"bundle {self._due} of attempt {self._attempt}"
            raise RunFailed(f"bundle {number} of attempt {attempt} arrived where {due} was due: the stream lost its order")
        self._due += self._part.world
