"""The board: one named actor per run, the only state shared between its processes.

It holds nothing that others cannot push again: the journal of metrics since the last drain, the attempt in charge, a person's wish
to stop, and where the newest versions of the student lie. Each start of the actor is a life of its own: whoever hears of another one
than before says again what it has to say.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from orchestrator.checkpoint import Position

RECENT_ENTRIES = 1000


@dataclass(frozen=True)
class Entry:
    """One line of the journal. `kind` is `step`, `eval`, `held` (bytes a rank holds), `attempt` or `note` (words on what went wrong)."""

    kind: str
    attempt: int
    step: int
    values: dict[str, Any] = field(default_factory=dict)
    time: float = 0.0


class Place(NamedTuple):
    """How far the journal was read."""

    life: str = ""
    number: int = 0


class Board:
    """Methods of the named actor `<run>/board`. Only waiting for a version takes time, and others are served meanwhile."""

    def __init__(self) -> None:
        self._life = uuid.uuid4().hex
        self._attempt = 0
        self._entries: list[Entry] = []
        self._first = 0
        self._stop = False
        self._versions: dict[int, Any] = {}
        self._controls: dict[int, dict[str, float]] = {}
        self._published = asyncio.Condition()

    def begin(self, attempt: int, step: int, time: float) -> None:
        """A worker group starts after `step`; entries and versions of older attempts are refused from now on."""
        self._attempt = attempt
        self._versions = {}
        self._entries.append(Entry("attempt", attempt, step, time=time))

    def post(self, attempt: int, life: str, entries: list[Entry]) -> tuple[bool, str]:
        """Adds to the journal what comes from the newest attempt and is meant for this `life`: whoever knows another has to begin again,
        so that entries stay in order. Returns whether a person asked to stop, and the life."""
        if attempt >= self._attempt and life == self._life:
            self._attempt = attempt
            self._entries += entries
        return self._stop, self._life

    def note(self, text: str) -> None:
        """Adds words for whoever watches the run: what happened, and what is done about it."""
        self._entries.append(Entry("note", self._attempt, 0, {"text": text}, time.time()))

    def drain(self, place: Place) -> tuple[list[Entry], Place]:
        """Entries from `place` on and the place behind them; older ones are forgotten. A place of another life is this one's beginning."""
        first = place.number if place.life == self._life else 0
        self._entries = self._entries[max(0, first - self._first) :]
        self._first = max(self._first, first)
        return self._entries, Place(self._life, self._first + len(self._entries))

    def ask_to_stop(self) -> None:
        self._stop = True

    def attempt(self) -> int:
        """The attempt in charge."""
        return self._attempt

    async def publish(self, attempt: int, versions: dict[int, Any], controls: dict[int, dict[str, float]] | None = None) -> None:
        """All versions of the student that may be asked for, by finished steps: each its sets of weights by name, as lists of one
        reference; and the values of controllers when it went out. What is older than what is known came late, and changes nothing."""
        if (attempt, max(versions)) < (self._attempt, max(self._versions, default=0)):
            return
        async with self._published:
            self._attempt, self._versions, self._controls = attempt, versions, controls or {}
            self._published.notify_all()

    async def wait_for_version(self, attempt: int, step: int) -> dict[str, float]:
        """Returns once the student after `step` steps is there, with the values that controllers had then; `RuntimeError` for an
        attempt that is not in charge any more."""
        async with self._published:
            await self._published.wait_for(lambda: attempt < self._attempt or any(v >= step for v in self._versions))
        self._check(attempt)
        return self._controls.get(step, {})

    async def version(self, attempt: int, step: int | None) -> tuple[int, Any]:
        """The student after `step` finished steps, the newest without one; waits for it after a restart of this actor."""
        async with self._published:
            await self._published.wait_for(lambda: attempt < self._attempt or self._has(step))
        self._check(attempt)
        number = max(self._versions) if step is None else step
        return number, self._versions[number]

    def _has(self, step: int | None) -> bool:
        return bool(self._versions) if step is None else step in self._versions

    def _check(self, attempt: int) -> None:
        if attempt < self._attempt:
            raise RuntimeError(f"got a question of attempt {attempt}; expected {self._attempt}, which is in charge")


def open_board(run: str) -> Any:
    """Handle of the run's board, started with this driver and restarted for ever. Calls wait for that as long as it takes: finding a node
    lost takes Ray longer than some retries, and a board takes what is told twice."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000)(Board)
    return actor.options(name=f"{run}/board").remote()


def tell_if_restarted(board: Any, what: str) -> None:
    """Tells the board when this actor is not the first of its kind: Ray starts one anew that was lost."""
    if board is not None and ray.get_runtime_context().was_current_actor_reconstructed:
        board.note.remote(f"{what} was lost and has been started anew; what it had not finished is done again.")


class RankJournal:
    """A training worker's side of the board. Rank 0 writes; every rank may be asked to stop. Waits for the board as it
    begins, and never again."""

    def __init__(self, board: Any, rank: int, start: Position | None):
        self.rank = rank
        self.recent: deque[Entry] = deque((Entry(**e) for e in start.journal) if start else (), maxlen=RECENT_ENTRIES)
        """Latest entries, kept in every checkpoint so that none is lost with a driver."""
        self.stopping = False
        self._board = board
        self._attempt = 0
        self._life = ""
        self._answer: Any = None

    @property
    def stop(self) -> bool:
        """Whether a person asked to stop, as far as this rank has heard."""
        return self.stopping

    def begin(self, attempt: int) -> None:
        """Speaks for `attempt` from now on, and repeats the checkpoint's entries."""
        self._attempt = attempt
        if self.rank == 0:
            self.stopping, self._life = ray.get(self._board.post.remote(attempt, "", []))
            self._send(list(self.recent))

    def held(self, held_bytes: Mapping[str, int]) -> None:
        """What this rank holds in memory, for the plan's estimate to be compared with."""
        self._write(Entry("held", self._attempt, 0, dict(held_bytes), time.time()))

    def step(self, attempt: int, step: int, metrics: Mapping[str, float]) -> None:
        self._write(Entry("step", attempt, step, dict(metrics), time.time()))

    def evaluated(self, attempt: int, step: int, metrics: Mapping[str, float]) -> None:
        self._write(Entry("eval", attempt, step, dict(metrics), time.time()))

    def note(self, text: str) -> None:
        """Words for whoever watches the run."""
        if self.rank == 0:
            self._board.note.remote(text)

    def _write(self, entry: Entry) -> None:
        if self.rank == 0:
            self.recent.append(entry)
            self._send([entry])

    def _send(self, entries: list[Entry]) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            stop, life = ray.get(self._answer)
            self.stopping |= stop
            entries = entries if life == self._life else list(self.recent)
            self._life, self._answer = life, None
        answer = self._board.post.remote(self._attempt, self._life, entries)
        self._answer = self._answer or answer
