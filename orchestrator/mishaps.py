"""Words for what went wrong while workers trained, told to the board by whoever sees it; what is done about it is told by who does it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from cluster import session
from orchestrator.errors import origin

SAME_SECONDS = 5.0
"""Failures heard within so long of each other are one; polls are more frequent, and a new worker group takes longer."""
LOST_TOUCH = re.compile(r"gloo|nccl|connection (reset|closed|refused)|broken pipe", re.IGNORECASE)
"""What a worker says that misses another, which is mostly noticed later."""
LOOK_SECONDS = 2.0
NODE_DIED = "its node has died"
"""Part of what Ray says of an actor that went with its node."""


@dataclass
class Witness(UserCallback):
    """Lives in Ray Train's controller, and tells the board which worker failed and how."""

    board: Any
    _heard: float = float("-inf")

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Called at every poll that finds the same failures, until something is done about them: told at the first."""
        fresh, self._heard = time.monotonic() - self._heard > SAME_SECONDS, time.monotonic()
        if fresh:
            self.board.note.remote(lost_worker(worker_exceptions))


class Nodes:
    """The cluster's nodes, as the driver sees them come and go."""

    def __init__(self) -> None:
        self._known = session.nodes()
        self._looked = time.monotonic()

    def changes(self) -> list[str]:
        """A sentence for each node that came or went since the last look, which is not more often than needed."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return []
        before, self._known, self._looked = self._known, session.nodes(), time.monotonic()
        gone = [f"The node at {before[n]} is gone; what ran there is done again elsewhere." for n in before if n not in self._known]
        return gone + [f"There is a new node at {self._known[n]}." for n in self._known if n not in before]


def lost_worker(failures: Mapping[int, Exception]) -> str:
    """One sentence on the worker that failed first: one that is gone or hangs before those that only missed it."""
    gone = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
    rank, error = min(failures.items(), key=lambda failure: (not isinstance(failure[1], gone), failure[0]))
    return f"Training worker {rank} {_fate(error)}."


def _fate(error: Exception) -> str:
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "does not answer any more and is taken for dead"
    cause = getattr(error, "health_check_failure", None)
    if not isinstance(cause, RayActorError):
        if LOST_TOUCH.search(str(error)):
            return "lost touch with another"
        return f"failed: {origin(error)}"
    if cause.preempted:
        return "went with its node, which was taken back"
    return "died with its node" if NODE_DIED in str(cause) else "died"
