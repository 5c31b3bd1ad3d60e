"""Words for what went wrong while workers trained, told to the board by whoever sees it; what is done about it is told by who does it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from orchestrator.errors import origin

SAME_SECONDS = 5.0
"""Failures heard within so long of each other are one; polls are more frequent, and a new worker group takes longer."""
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
        return f"failed: {origin(error)}"
    if cause.preempted:
        return "went with its node, which was taken back"
    return "died with its node" if NODE_DIED in str(cause) else "died"
