"""Who fills a store now: at most one process at a time, on any filesystem.

Whoever fills writes its name with a count that rises every few seconds. Others wait while the count rises. When it has not for
`DEAD_SECONDS` by the waiter's own clock, or its process on this machine is gone, the holder counts as dead. Filesystems
without an exclusive create leave a moment in which two may believe to hold it; parts are written whole and equal, so the store
stays sound, and only work is done twice.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.storage import Folder

LEASE = "lease.json"
BEAT_SECONDS = 2.0
DEAD_SECONDS = 15.0
SETTLE_SECONDS = 0.3
"""How long after writing its name a process looks whether another wrote over it."""


@contextmanager
def held(folder: Folder, wait: Callable[[str], None], until: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Holds the folder's lease inside; waits for another holder first, telling `wait` its name once.

    Yields False, without the lease, as soon as `until` is true while waiting: what was waited for is done.
    """
    me = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
    if not _acquire(folder, me, wait, until):
        yield False
        return
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, me, ended), name="lease", daemon=True)
    beat.start()
    try:
        yield True
    finally:
        ended.set()
        beat.join()
        if _holder(folder)[0] == me:
            folder.remove(LEASE)


def _acquire(folder: Folder, me: str, wait: Callable[[str], None], until: Callable[[], bool]) -> bool:
    told = False
    while True:
        if until():
            return False
        before = _holder(folder)[0]
        if other := _living(folder, until):
            if not told:
                wait(other)
                told = True
            continue
        if before and _holder(folder)[0] == before:  # dead, and nobody else's meanwhile
            folder.remove(LEASE)
        if not folder.create(LEASE, _content(me, 0)):
            continue
        time.sleep(SETTLE_SECONDS)
        if _holder(folder)[0] == me:
            return True


def holder_alive(folder: Folder) -> bool:
    """Whether somebody fills the store now; watches for as long as it takes to know."""
    return _living(folder, lambda: False) is not None


def _living(folder: Folder, enough: Callable[[], bool]) -> str | None:
    """The holder, if its count rises while it is watched; None for nobody and for a dead one."""
    holder, count = _holder(folder)
    if not holder or _gone(holder):
        return None
    end = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < end and not enough():
        time.sleep(BEAT_SECONDS / 4)
        if _holder(folder) != (holder, count):
            return holder
        if _gone(holder):
            return None
    return holder if enough() else None


def _gone(holder: str) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    host, pid, _ = holder.split("/")
    return host == socket.gethostname() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists()


def _holder(folder: Folder) -> tuple[str, int]:
    try:
        content = json.loads(folder.read(LEASE) or b"{}")
    except (ValueError, OSError):  # being written, or just removed
        return "", 0
    return str(content.get("holder", "")), int(content.get("count", 0))


def _write(folder: Folder, me: str, count: int) -> None:
    folder.write(LEASE, _content(me, count))


def _content(me: str, count: int) -> bytes:
    return json.dumps({"holder": me, "count": count}).encode()


def _beat(folder: Folder, me: str, ended: threading.Event) -> None:
    count = 0
    while not ended.wait(BEAT_SECONDS):
        count += 1
        _write(folder, me, count)
