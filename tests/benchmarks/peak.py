"""Peak resident memory of a process below this one, as the kernel keeps it, read while it lives."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

EVERY_SECONDS = 0.2
"""The kernel keeps the peak (`VmHWM`), so only growth in a process's last moments can be missed."""


class Peak:
    """The largest peak of any process whose command line holds `title`."""

    def __init__(self, title: str):
        self.title = title
        self.bytes = 0
        self._over = threading.Event()

    def watch(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess, OSError, StopIteration):  # it has ended since it was listed
                    self._look_at(process)

    def _look_at(self, process: psutil.Process) -> None:
        if self.title in " ".join(process.cmdline()):
            self.bytes = max(self.bytes, high_water(process.pid))

    def stop(self) -> None:
        self._over.set()


def high_water(pid: int) -> int:
    """Peak resident bytes of a process so far, what it shares with others included."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


@contextmanager
def watching(title: str) -> Iterator[Peak]:
    """Watches every child and grandchild of this process until the block ends. `SystemExit` when none was seen."""
    peak = Peak(title)
    thread = threading.Thread(target=peak.watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        time.sleep(2 * EVERY_SECONDS)
        peak.stop()
        thread.join()
    if not peak.bytes:
        raise SystemExit(f"no process with {title!r} in its command line was seen")
