"""Who speaks for a run's folder: a driver for as long as its heart beats, and one process at a time about what MLflow is told."""

from __future__ import annotations

import contextlib
import fcntl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from orchestrator.journal import HEARTBEAT, Heartbeat

LOCK = "mlflow.lock"
BEAT_SECONDS = 5.0
_LOOK_SECONDS = 0.1


class Pulse:
    """Writes a run's heartbeat in a thread of its own, until `end`: whoever looks takes a silent driver for dead, and MLflow may keep
    every other thread waiting."""

    def __init__(self, folder: Path):
        self._folder, self._over = folder, threading.Event()
        Heartbeat.now().save(folder)
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk stops the beat for now, not for good
                Heartbeat.now().save(self._folder)

    def end(self) -> None:
        """From here on anybody may speak for the folder."""
        self._over.set()
        self._thread.join()
        (self._folder / HEARTBEAT).unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Inside, nobody else decides what a run's record says; False where somebody else is about to. On a filesystem without locks
    everybody may."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((folder / LOCK).open("w"))
        except OSError:  # a folder that cannot be written to
            file = None
        yield file is None or _locked(file, time.monotonic() + wait_seconds)


def _locked(file: IO[str], deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        except OSError:  # no locks here
            return True
        else:
            return True
