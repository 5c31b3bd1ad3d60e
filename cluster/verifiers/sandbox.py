"""Unit tests of written code, run in a confined process that is gone afterwards, with all it started."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.verifiers import Judged, VerifierFailed

RUNNER = Path(__file__).with_name("sandbox_main.py")
_FENCE = "```"
_PIPE_BYTES = 65536
"""All that a pipe holds."""


@dataclass(frozen=True)
class Limits:
    """What each process of a sandbox may use, besides the sandbox's time."""

    memory_bytes: int = 2**30
    file_bytes: int = 16 * 2**20
    """Size of one file that it writes."""
    processes: int = 64
    """Processes and threads of the sandbox together."""


def run_tests(text: str, tests: str, timeout_seconds: float, limits: Limits = Limits()) -> Judged:
    """1 when the Python code `tests` runs to its end after the code in `text`, else 0; None for tests that do not compile.

    The code is the text's last fenced block, or all of it. The tests see its names and may import it as `solution`. After their
    statements, their functions `test_*` (without arguments, nothing returned) and their `unittest` cases are run; what is skipped
    has not passed. That the end was reached is told by a random word through a pipe that the code is not told of, so that
    exit codes, output and `sys.exit` prove nothing.

    The process is `python -I` with an environment of PATH alone, a session of its own, an empty working directory that is removed,
    one CPU, `limits`, and `timeout_seconds` of wall clock, after which its process group is killed. Where the kernel permits user
    namespaces (or to root, namespaces at all), it has no network, and a process namespace ends whatever left the group. Started by
    root it becomes a user who owns nothing; started by root whose Python only root can read, one who may still read everything.

    What it does not do: keep in code that is made to break out or to forge the word, which the memory of its own process holds.
    Without namespaces the network is there, a process that leaves the group lives on, and `processes` counts all
    of the user's. Not started by root, code may write wherever this user may. Files outside the working directory stay.

    `VerifierFailed` when the process ends before the code's turn.
    """
    solution = solution_of(text)
    if not tests.strip():
        return Judged(None, "the reference has no tests")
    if not solution.strip():
        return Judged(0.0, "no code")
    word = secrets.token_hex(16)
    said, in_time = _run({"solution": solution, "tests": tests, "word": word, **asdict(limits)}, timeout_seconds)
    if f"{word} passed" in said:
        return Judged(1.0, "")
    if f"{word} broken" in said:
        return Judged(None, "the tests do not compile")
    if f"{word} begun" not in said:
        raise VerifierFailed(f"the sandbox {'ended' if in_time else f'took {timeout_seconds:g} s'} before it ran anything")
    return Judged(0.0, "the tests do not pass" if in_time else "out of time")


def solution_of(text: str) -> str:
    """The last closed fenced block of a text after its thoughts; all of it where there is none."""
    said = text.rpartition("</think>")[2]
    block: list[str] | None = None
    last: str | None = None
    for line in said.splitlines(keepends=True):
        if not line.lstrip().startswith(_FENCE):
            if block is not None:
                block.append(line)
        elif block is None:
            block = []
        else:
            last, block = "".join(block), None
    return said if last is None else last


def _run(job: dict[str, object], seconds: float) -> tuple[str, bool]:
    """What the runner said through its pipe, and whether it ended by itself."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as report, open(writing, "wb", buffering=0) as theirs:
        os.set_blocking(reading, False)  # a process that left the group may hold the other end open for ever
        with tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as folder:
            given = json.dumps({**job, "report": writing, "cpu_seconds": math.ceil(seconds)}).encode()
            in_time = _finished(folder, writing, given, seconds)
            theirs.close()
        return (report.read(_PIPE_BYTES) or b"").decode(errors="replace"), in_time


def _finished(folder: str, descriptor: int, given: bytes, seconds: float) -> bool:
    """Runs the runner to its end or its limit; nobody of its process group is left."""
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", str(RUNNER)],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", os.defpath)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            start_new_session=True,
        )
    except OSError as error:
        raise VerifierFailed(f"the sandbox could not be started ({error})") from error
    try:
        child.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return True
