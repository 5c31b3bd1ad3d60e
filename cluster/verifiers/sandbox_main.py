"""The child of `sandbox.py`: confines itself, then runs a solution and its tests. A script, for `python -I`; imports nothing of ours."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import struct
import sys
import types
import unittest
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET
DEATH_SIGNAL, KEEP_CAPABILITIES, NO_NEW_PRIVILEGES = 1, 8, 38  # PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS
READ_EVERYTHING = 1 << 2  # CAP_DAC_READ_SEARCH
CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
FREE_USERS = range(61184, 65520)
"""User ids that systemd sets aside for short-lived users, so nobody has files of theirs."""


def main() -> None:
    """Reads the job from standard input. Reports `WORD begun` before the solution's turn, and `WORD passed` or `WORD broken`."""
    job = json.load(sys.stdin)
    os.set_inheritable(job["report"], False)
    if _confine(job):
        _step_inside()
    try:
        tests = compile(job["tests"], "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        _leave(job, "broken")
    _report(job, "begun")
    try:
        run(job["solution"], tests)
    except BaseException:  # noqa: BLE001 - SystemExit too: whatever ends the tests early is a failure
        os._exit(1)
    _leave(job, "passed")


def run(solution: str, tests: types.CodeType) -> None:
    """Whatever the solution or its tests raise; `AssertionError` for tests that did not pass."""
    given = _module("solution")
    exec(compile(solution, "<solution>", "exec"), given.__dict__)
    asked = _module("tests")
    asked.__dict__.update({name: value for name, value in vars(given).items() if not name.startswith("__")})
    exec(tests, asked.__dict__)
    own = [value for value in list(vars(asked).values()) if getattr(value, "__module__", None) == "tests"]
    for function in own:
        if isinstance(function, types.FunctionType) and function.__name__.startswith("test_") and function() is not None:
            raise AssertionError(f"{function.__name__} returned something, so perhaps it did not run")
    result = unittest.TestResult()
    for case in own:
        if isinstance(case, type) and issubclass(case, unittest.TestCase):
            unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    if result.skipped or not result.wasSuccessful():
        raise AssertionError("a case did not pass")


def _module(name: str) -> types.ModuleType:
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name]


def _report(job: dict[str, Any], what: str) -> None:
    os.write(job["report"], f"{job['word']} {what}\n".encode())


def _leave(job: dict[str, Any], what: str) -> None:
    """At once: no thread, exit handler or destructor of the solution has a say after its tests."""
    _report(job, what)
    os._exit(0)


def _confine(job: dict[str, Any]) -> bool:
    """Whether children of this process are in a process namespace of their own."""
    # One CPU keeps a flood of processes off the others, and libraries from starting a thread for each of many.
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    apart = NEW_PROCESSES | NEW_NETWORK
    root = os.geteuid() == 0
    inside: bool = _LIBC.unshare(apart if root else apart | NEW_USER) == 0
    if root:
        _become_nobody()
    _LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for what, most in (
        (resource.RLIMIT_CPU, job["cpu_seconds"]),  # soft and hard alike: the first process of a namespace survives SIGXCPU
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, job["file_bytes"]),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    return inside


def _become_nobody() -> None:
    """From root to a user who owns only the working directory; the kernel limits no number of processes for root.

    Stays root where no other id exists. `OSError` when the libraries of Python would be out of reach.
    """
    user = FREE_USERS[os.getpid() % len(FREE_USERS)]
    places = [path for path in (os.__file__, os.getcwd(), *sys.path) if os.path.exists(path)]
    try:
        os.chown(".", user, user)
        os.seteuid(user)
    except OSError:
        return
    private = not all(os.access(path, os.R_OK, effective_ids=True) for path in places)
    os.seteuid(0)
    _LIBC.prctl(KEEP_CAPABILITIES, int(private), 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if private:
        kept = struct.pack("6I", READ_EVERYTHING, READ_EVERYTHING, 0, 0, 0, 0)
        _LIBC.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), kept)
    open(os.__file__).close()


def _step_inside() -> None:
    """Goes on as the first process of the new namespace, whose end is that of all in it; this process waits for it."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    _LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main()
