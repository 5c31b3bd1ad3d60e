"""The driver's own small files of a run whose folder is in remote storage: kept beside its checkpoints, so that any machine can go on.

They are written on this machine, line by line, which such a storage cannot; a copy follows within seconds. Where the folder is on this
machine they lie in it, and there is nothing to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from cluster.storage import Folder
from orchestrator.journal import HEARTBEAT, RECORD, RunRecord
from orchestrator.tracking_uri import sqlite_path, without_password

COPY = "driver"
"""Folder of the copy, in the run's."""
OWNER = "owner"
"""Names who wrote the copy last, in the copy and beside the files themselves."""
EVERY_SECONDS = 20.0
LEAST_PAUSE = 50
"""Times as long as copying took; a long run's journal is large."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def mirrored(local: Path, folder: Folder) -> Iterator[None]:
    """Brings the files of `folder`'s copy to `local`, unless those here are what was copied last; then copies what changes here until the
    block ends, and once more after that. A storage that does not answer then delays the copy and does nothing else."""
    if folder.local is not None:
        yield
        return
    mirror, done = _Mirror(local, folder.child(COPY)), threading.Event()
    mirror.begin()
    thread = threading.Thread(target=_follow, args=(mirror, done), name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        mirror.keep()


def _follow(mirror: _Mirror, done: threading.Event) -> None:
    pause = EVERY_SECONDS
    while not done.wait(pause):
        began = time.monotonic()
        mirror.keep()
        pause = max(EVERY_SECONDS, LEAST_PAUSE * (time.monotonic() - began))


class _Mirror:
    """Files here, and their copy."""

    def __init__(self, local: Path, copy: Folder):
        self._local, self._copy = local, copy
        self._known: dict[str, tuple[int, int]] = {}

    def begin(self) -> None:
        """The newest of both is here, and the copy is this folder's from now on."""
        mine, last = self._local / OWNER, self._copy.read(OWNER)
        if last is not None and not (mine.exists() and mine.read_bytes() == last):
            self._local.mkdir(parents=True, exist_ok=True)
            (self._local / RECORD).unlink(missing_ok=True)
            for name in self._copy.sizes():
                (self._local / name).write_bytes(self._copy.read(name) or b"")
        self._local.mkdir(parents=True, exist_ok=True)
        mine.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._copy.write(OWNER, mine.read_bytes())

    def keep(self) -> None:
        """Copies files that are not as they were the last time."""
        try:
            for path in self._local.iterdir():
                if not path.is_file() or path.name in (HEARTBEAT, OWNER) or path.suffix == ".part":
                    continue
                look = path.stat()
                if self._known.get(path.name) != (look.st_size, look.st_mtime_ns):
                    self._send(path)
                    self._known[path.name] = look.st_size, look.st_mtime_ns
        except FileNotFoundError:  # one that was replaced just now is copied the next time
            return
        except OSError as error:
            logger.warning("%s does not take the run's small files (%s); they are in %s.", self._copy.root, error, self._local)

    def _send(self, path: Path) -> None:
        if path.name != RECORD:
            self._copy.write(path.name, path.read_bytes())
        elif (record := RunRecord.load(self._local)) and sqlite_path(record.uri) is None:  # nobody else has this machine's database
            public = dataclasses.replace(record, uri=without_password(record.uri))
            self._copy.write(RECORD, json.dumps(dataclasses.asdict(public)).encode())
