"""A verifier in a process of its own, which may throw, hang or die there and is started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from cluster.verifiers import Judged, VerifierFailed

START_SECONDS = 120.0
"""For importing a verifier, which may be large, on a machine that is busy."""


class JudgeProcess:
    """Judges texts one after another in one child process, which lives until it misbehaves or `close`, and no longer than this one.

    `settings` are `kind`, and `pattern` or `function` where the kind has one. Not for texts that are code: a callable sees the
    network and the files of this process. It may hold as much memory as it likes; other kinds hold at most 4 GiB.
    """

    def __init__(self, settings: Mapping[str, str | None], timeout_seconds: float):
        """`VerifierFailed` when the verifier cannot be imported."""
        self._settings = dict(settings)
        self._seconds = timeout_seconds
        self._start()

    def judge(self, text: str, reference: str) -> Judged:
        """`VerifierFailed` when there is no verdict after `timeout_seconds`; the next text is judged all the same."""
        if self._child.poll() is not None:
            self._start()
        try:
            self._ours.send_bytes(json.dumps([text, reference, self._seconds]).encode())
            if self._ours.poll(self._seconds):
                return _read(self._ours.recv_bytes())
            problem = f"hung: no verdict after {self._seconds:g} s"
        except (EOFError, OSError):
            problem = "died"
        self.close()
        raise VerifierFailed(f"the verifier {problem}")

    def close(self) -> None:
        """Ends the child and whatever it started in its process group. A later `judge` starts another."""
        self._end()

    def _start(self) -> None:
        self._ours, theirs = Pipe()
        command = [sys.executable, "-m", "cluster.verifiers.process_main", str(theirs.fileno()), json.dumps(self._settings)]
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        self._child = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, self._child, self._ours)
        try:
            problem = self._ours.recv_bytes().decode() if self._ours.poll(START_SECONDS) else f"no sign of life after {START_SECONDS:g} s"
        except (EOFError, OSError):
            problem = "the process died at once"
        if problem:
            self.close()
            raise VerifierFailed(f"{self._settings.get('function') or self._settings['kind']!r}: {problem}")


def _read(answer: bytes) -> Judged:
    reward, reason, failed = json.loads(answer)
    if failed:
        raise VerifierFailed(f"the verifier threw {reason}")
    return Judged(reward, reason)


def _end(child: subprocess.Popen[bytes], ours: Connection) -> None:
    ours.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
