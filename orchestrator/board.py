"""The board: one named actor per run, the only state shared between its processes.

It holds nothing that rank 0 cannot push again from a checkpoint: the journal of metrics since the last drain, the
attempt in charge, and a person's wish to stop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from orchestrator.checkpoint import Position

RECENT_ENTRIES = 1000


@dataclass(frozen=True)
class Entry:
    """One line of the journal. `kind` is `step`, `eval`, `held` (bytes a rank holds), `attempt` or `note`."""

    kind: str
    attempt: int
    step: int
    values: dict[str, Any] = field(default_factory=dict)
    time: float = 0.0


class Board:
    """Methods of the named actor `<run>/board`."""

    def __init__(self) -> None:
        self._attempt = 0
        self._entries: list[Entry] = []
        self._first = 0
        self._stop = False

    def begin(self, attempt: int, step: int, time: float) -> None:
        """A worker group starts after `step`; entries of older attempts are refused from now on."""
        self._attempt = attempt
        self._entries.append(Entry("attempt", attempt, step, time=time))

    def post(self, attempt: int, entries: list[Entry]) -> bool:
        """Adds to the journal unless an older attempt writes; returns whether a person asked to stop."""
        if attempt >= self._attempt:
            self._entries += entries
        return self._stop

    def drain(self, first: int) -> tuple[list[Entry], int]:
        """Entries from number `first` on and the next number; older ones are forgotten."""
        self._entries = self._entries[max(0, first - self._first) :]
        self._first = max(self._first, first)
        return self._entries, self._first + len(self._entries)

    def ask_to_stop(self) -> None:
        self._stop = True


def open_board(run: str) -> Any:
    """Handle of the run's board, started with this driver and restarted for ever."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Board)
    return actor.options(name=f"{run}/board").remote()


class RankJournal:
    """A training worker's side of the board. Rank 0 writes; every rank may be asked to stop. Never waits for the board."""

    def __init__(self, board: Any, rank: int, start: Position | None):
        self.rank = rank
        self.recent: deque[Entry] = deque((Entry(**e) for e in start.journal) if start else (), maxlen=RECENT_ENTRIES)
        """Latest entries, kept in every checkpoint so that none is lost with a driver."""
        self.stopping = False
        self._board = board
        self._attempt = 0
        self._answer: Any = None

    @property
    def stop(self) -> bool:
        """Whether a person asked to stop, as far as this rank has heard."""
        return self.stopping

    def begin(self, attempt: int) -> None:
        """Speaks for `attempt` from now on, and repeats the checkpoint's entries."""
        self._attempt = attempt
        if self.rank == 0:
            self._send(list(self.recent))

    def held(self, held_bytes: Mapping[str, int]) -> None:
        """What this rank holds in memory, for the plan's estimate to be compared with."""
        if self.rank == 0:
            self._send([Entry("held", self._attempt, 0, dict(held_bytes), time.time())])

    def step(self, attempt: int, step: int, metrics: Mapping[str, float]) -> None:
        self._write(Entry("step", attempt, step, dict(metrics), time.time()))

    def evaluated(self, attempt: int, step: int, metrics: Mapping[str, float]) -> None:
        self._write(Entry("eval", attempt, step, dict(metrics), time.time()))

    def _write(self, entry: Entry) -> None:
        if self.rank == 0:
            self.recent.append(entry)
            self._send([entry])

    def _send(self, entries: list[Entry]) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self.stopping |= ray.get(self._answer)
            self._answer = None
        answer = self._board.post.remote(self._attempt, entries)
        self._answer = self._answer or answer
