"""A small process that keeps a run's MLflow status true when its driver can no longer speak (SIGKILL, out of memory).

It reads a pipe that only the driver holds open. The word `done` before the end means that the driver has said everything
itself; an end without it means that the driver is gone, and the run becomes KILLED. Nothing heavy is imported until then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

DONE = b"done"
_TRY_SECONDS = 60.0
_PAUSE_SECONDS = 2.0


def start(folder: Path, beside: str = "") -> subprocess.Popen[bytes]:
    """Watches this process for the run in `folder`, in a session of its own that no Ctrl-C reaches. `release` ends it.

    With `beside`, a pattern of names, for the runs next to `folder` whose own processes end with this one: Ray kills what its
    workers have started, their watchdogs too.
    """
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.watchdog", str(folder), str(os.getpid()), beside],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # an inherited pipe would keep whoever reads the driver's output waiting
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def release(watchdog: subprocess.Popen[bytes], timeout_seconds: float = 5.0) -> None:
    """Tells the watchdog that there is nothing left to do, and waits for its end."""
    try:
        watchdog.communicate(DONE, timeout=timeout_seconds)
    except (BrokenPipeError, subprocess.TimeoutExpired):  # it is gone already, or it was stopped by someone
        watchdog.kill()
        watchdog.wait()


def main(folder: Path, driver_pid: int, beside: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever stops a job signals all its processes, and the driver is the one to speak
    if sys.stdin.buffer.read().endswith(DONE):
        return
    from orchestrator.track import reconcile

    open_states = ("waiting", "running") if beside else ("waiting",)  # what ends with the driver may take a moment
    folders = sorted(folder.parent.glob(beside)) if beside else [folder]
    deadline = time.monotonic() + _TRY_SECONDS
    while [f for f in folders if reconcile(f, dead_pid=driver_pid) in open_states] and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
