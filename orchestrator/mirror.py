"""The driver's own small files of a run whose folder is in remote storage: kept beside its checkpoints, so that any machine can go on.

They are written on this machine, line by line, which such a storage cannot; a copy follows within seconds, with who drives the run. Where
the folder is on this machine they lie in it, and there is nothing to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from cluster.storage import Folder
from orchestrator.claim import LOCK
from orchestrator.journal import HEARTBEAT, RECORD, Heartbeat, RunRecord
from orchestrator.owner import COPY, OWNER, Owner, public_root
from orchestrator.tracking_uri import sqlite_path, without_password

EVERY_SECONDS = 20.0
LEAST_PAUSE = 50
"""Times as long as copying took; a long run's journal is large."""
RENEW_SECONDS = 15.0
"""Between a driver's signs of life in the copy, however long copying takes."""
PART = ".part"
"""Ends the name of a file that is being written."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def mirrored(local: Path, folder: Folder) -> Iterator[None]:
    """Brings the files of `folder`'s copy to `local`, unless those here are what was copied last; then copies what changes here until the
    block ends, and once more after that. A storage that does not answer then delays the copy and does nothing else. Once another driver
    has taken the run over, nothing is copied any more."""
    if folder.local is not None:
        yield
        return
    mirror, done = _Mirror(local, folder), threading.Event()
    mirror.begin()
    threads = [threading.Thread(target=work, args=(mirror, done), name="mirror", daemon=True) for work in (_follow, _renew)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
        mirror.keep()
        mirror.say(None)


def _follow(mirror: _Mirror, done: threading.Event) -> None:
    pause = EVERY_SECONDS
    while not done.wait(pause):
        began = time.monotonic()
        mirror.keep()
        pause = max(EVERY_SECONDS, LEAST_PAUSE * (time.monotonic() - began))


def _renew(mirror: _Mirror, done: threading.Event) -> None:
    while not done.wait(RENEW_SECONDS):
        mirror.say(Heartbeat.now())


class _Mirror:
    """Files here, and their copy."""

    def __init__(self, local: Path, home: Folder):
        self._local, self._home, self._copy = local, home, home.child(COPY)
        self._id, self._lost = uuid.uuid4().hex, False
        self._known: dict[str, tuple[int, int]] = {}

    def begin(self) -> None:
        """The newest of both is here, and the copy is this folder's from now on."""
        mine, last = Owner.here(self._local), Owner.of_copy(self._home)
        self._local.mkdir(parents=True, exist_ok=True)
        if last is not None and not last.same(mine):
            self._own("")  # a driver that is killed before all is here leaves files that are not taken for the copy's
            self._fetch()
        self._own(self._id)
        self._copy.write(OWNER, Owner(self._id, beat=Heartbeat.now()).to_json())

    def keep(self) -> None:
        """Copies files that are not as they were the last time."""
        try:
            if not self._ours():
                return
            for path in self._local.iterdir():
                if not path.is_file() or path.name in (HEARTBEAT, LOCK, OWNER) or path.suffix == PART:
                    continue
                look = path.stat()
                if self._known.get(path.name) != (look.st_size, look.st_mtime_ns):
                    self._send(path)
                    self._known[path.name] = look.st_size, look.st_mtime_ns
        except FileNotFoundError:  # one that was replaced just now is copied the next time
            return
        except OSError as error:
            logger.warning("%s does not take the run's small files (%s); they are in %s.", self._copy.root, error, self._local)

    def say(self, beat: Heartbeat | None) -> None:
        """Writes into the copy who drives, or that nobody does, unless another driver has written there. `keep` tells of a storage that
        does not answer."""
        with contextlib.suppress(OSError):
            if self._ours():
                self._copy.write(OWNER, Owner(self._id, beat=beat).to_json())

    def _ours(self) -> bool:
        """Whether no other driver has taken the run over."""
        owner = None if self._lost else Owner.of_copy(self._home)
        if owner is not None and owner.id and owner.id != self._id:
            self._lost = True
            who = f"process {owner.beat.pid} of {owner.beat.host}" if owner.beat else "another driver"
            words = "%s took %s over: what this driver still writes is in %s alone."
            logger.warning(words, who, public_root(self._home.root), self._local)
        return not self._lost

    def _own(self, name: str) -> None:
        _put(self._local / OWNER, Owner(name, public_root(self._home.root)).to_json())

    def _fetch(self) -> None:
        (self._local / RECORD).unlink(missing_ok=True)
        for name in self._copy.sizes():
            if name != OWNER and not name.endswith(PART):
                _put(self._local / name, self._copy.read(name) or b"")

    def _send(self, path: Path) -> None:
        if path.name != RECORD:
            self._copy.write(path.name, path.read_bytes())
        elif (record := RunRecord.load(self._local)) and sqlite_path(record.uri) is None:  # nobody else has this machine's database
            public = dataclasses.replace(record, uri=without_password(record.uri))
            self._copy.write(RECORD, json.dumps(dataclasses.asdict(public)).encode())


def _put(path: Path, content: bytes) -> None:
    """Replaces a file whole: other commands on this machine read the records of all runs."""
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    part.write_bytes(content)
    part.replace(path)
