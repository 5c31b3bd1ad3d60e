"""The rollout log of a run: what students wrote, one folder for each optimizer step and in it one file for each training worker.

Files are numpy archives of flat columns, written whole. A step is in the log once every worker has written its file, an empty one
where its student wrote nothing; whoever reads a step knows by other means that this is so.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.engines import Columns
from cluster.storage import Folder

SUFFIX = ".npz"


@dataclass(frozen=True)
class RolloutLog:
    """Grows at its end, and is shortened at its beginning by who knows what is not read again; a run that goes on from an earlier step
    takes back what later steps left."""

    folder: Folder

    def write(self, step: int, part: int, columns: Columns) -> None:
        """Rows written for `step`, of the worker numbered `part`. Replaces what is there."""
        content, arrays = io.BytesIO(), dict[str, Any](columns)
        np.savez(content, **arrays)
        self._of(step).write(f"{part:05d}{SUFFIX}", content.getvalue())

    def read(self, step: int) -> list[Columns]:
        """Rows written for `step`, one set of columns for each worker. `FileNotFoundError` when the step is not there."""
        folder = self._of(step)
        contents = [folder.read(name) for name in folder.names() if name.endswith(SUFFIX)]
        if not contents:
            raise FileNotFoundError(f"{folder.root}: got nothing; expected what the student wrote for step {step}. Start the run anew")
        return [_columns(content) for content in contents if content is not None]

    def forget_after(self, step: int) -> None:
        """Removes what was written for later steps."""
        self._forget(lambda found: found > step)

    def forget_before(self, step: int) -> None:
        """Removes what was written for earlier steps."""
        self._forget(lambda found: found < step)

    def _forget(self, unwanted: Callable[[int], bool]) -> None:
        for name in self.folder.names():
            if name.isdigit() and unwanted(int(name)):
                self.folder.child(name).clear()

    def _of(self, step: int) -> Folder:
        return self.folder.child(f"{step:08d}")


def _columns(content: bytes) -> Columns:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return dict(archive)
