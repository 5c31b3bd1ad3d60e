"""One start of the worker group: from which step, under which number, on which stream."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray

from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.held_out_store import COMPLETE
from orchestrator.pipeline import StreamSpec, open_stream

ATTEMPTS = "attempts"
"""File in the run's folder that holds the number of the newest attempt."""


@dataclass(frozen=True)
class StreamFactory:
    """Opens the stream of one attempt; Ray Train's controller calls it at every start of the worker group.

    The start step comes from the newest committed checkpoint in Ray Train's own snapshot, never from a directory
    listing nor from the board.
    """

    spec: StreamSpec
    folder: Folder
    held_out: Folder
    board: Any
    begins: Folder | None = None
    """Checkpoint of another run that goes before this one's own."""

    def __call__(self) -> ray.data.Dataset:
        attempt = int(self.folder.read(ATTEMPTS) or b"0") + 1
        self.folder.write(ATTEMPTS, str(attempt).encode())
        last = checkpoint.committed(self.folder) or self.begins
        start = checkpoint.read_position(last) if last else checkpoint.Position(0, attempt, {})
        ray.get(self.board.begin.remote(attempt, start.step, time.time()))
        return open_stream(self.spec, start.step, attempt, not self.held_out.exists(COMPLETE), start.cursor, self.board)
