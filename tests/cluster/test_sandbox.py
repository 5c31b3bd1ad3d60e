"""Tests of written code: what passes, what does not, and what is left of it afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.verifiers import Judged, VerifierFailed
from cluster.verifiers import sandbox as sandbox_module
from cluster.verifiers.sandbox import Limits, run_tests, solution_of

RIGHT = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"
SECONDS = 60.0
"""Far more than any of this takes on a busy machine."""
PASSED, WRONG = Judged(1.0, ""), Judged(0.0, "the tests do not pass")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sandboxes have their working directories; empty again after each test."""
    tmp_path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tests",
    [
        TESTS,
        "from solution import add\nassert add(1, 2) == 3",
        "def test_sum():\n    assert add(1, 2) == 3",
        "import unittest\nclass T(unittest.TestCase):\n    def test_sum(self):\n        self.assertEqual(add(1, 2), 3)",
    ],
)
def test_right_code_passes_and_wrong_code_does_not(tests: str) -> None:
    assert run_tests(f"So:\n```python\n{RIGHT}```\nThat is it.", tests, SECONDS) == PASSED
    assert run_tests(RIGHT.replace("+", "-"), tests, SECONDS) == WRONG


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import unittest\nraise unittest.SkipTest('later')",
        "def add(a, b):\n    raise SystemExit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    return 0",
        "import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'passed\\n')\n    except OSError:\n        pass\nos._exit(0)",
        "print('passed')\nprint('begun', flush=True)\nraise KeyboardInterrupt",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal\nos.kill(0, signal.SIGKILL)",
        "def test_mine():\n    pass\nclass add:\n    def __init__(self, *_): pass",
        "def broken(:",
        "\x00",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_no_way_out_before_the_end_of_the_tests_counts_as_passed(code: str) -> None:
    assert run_tests(code, TESTS, SECONDS) == WRONG


def test_a_skipped_case_and_a_test_that_did_not_run_have_not_passed() -> None:
    skipping = "import unittest\nclass T(unittest.TestCase):\n    def test_sum(self):\n        self.assertEqual(add(1, 2), 3)"
    assert run_tests("import unittest\ndef add(a, b):\n    raise unittest.SkipTest('later')", skipping, SECONDS) == WRONG
    assert run_tests(RIGHT, "async def test_sum():\n    assert add(1, 2) == 4", SECONDS) == WRONG


def test_noise_and_what_runs_after_the_tests_change_nothing() -> None:
    noise = "import sys, atexit, os\nprint('x' * 10**6)\nprint('y' * 10**6, file=sys.stderr)\natexit.register(os._exit, 1)\n"
    assert run_tests(noise + RIGHT, TESTS, SECONDS) == PASSED
    began, sleeping = time.monotonic(), "import threading, time\nthreading.Thread(target=time.sleep, args=(999,)).start()\n"
    assert run_tests(sleeping + RIGHT, TESTS, SECONDS) == PASSED
    assert time.monotonic() - began < SECONDS / 2


def test_nobody_can_say_without_tests_that_compile() -> None:
    assert run_tests(RIGHT, "  \n", SECONDS).reward is None
    assert run_tests(RIGHT, "assert add(1", SECONDS) == Judged(None, "the tests do not compile")
    assert run_tests("```python\n```", TESTS, SECONDS) == Judged(0.0, "no code")


def test_an_endless_loop_ends_in_time() -> None:
    began = time.monotonic()
    assert run_tests("while True:\n    pass", TESTS, 5.0) == Judged(0.0, "out of time")
    assert time.monotonic() - began < 30


def test_every_limit_is_set_for_good() -> None:
    tests = "import os, resource as r\nassert [r.getrlimit(x) for x in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_NPROC)] == "
    tests += f"[({round(SECONDS)},) * 2, ({2**30},) * 2, ({2**24},) * 2, (64,) * 2]\nassert len(os.sched_getaffinity(0)) == 1\n"
    tests += f"try:\n    r.setrlimit(r.RLIMIT_AS, ({2**31},) * 2)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError"
    assert run_tests(RIGHT, tests, SECONDS) == PASSED


def enclosed() -> bool:
    """Whether this kernel permits namespaces, asked of util-linux."""
    command = ["unshare", *([] if os.geteuid() == 0 else ["--user"]), "--net", "--pid", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def holders(mark: str) -> list[str]:
    """Processes that hold a file named `mark` open, which may have been removed."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found += [descriptor.parts[2]] if mark in os.readlink(descriptor) else []
    return found


@pytest.mark.parametrize(
    "escape",
    [
        "while True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.01)",
        "if os.fork() == 0:\n    os.fork()\n    time.sleep(999)\n" + RIGHT,
        "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(999)\n" + RIGHT,
    ],
)
def test_whatever_was_started_is_gone(escape: str) -> None:
    if "setsid" in escape and not enclosed():
        pytest.skip("only namespaces hold what leaves its group")
    mark = f"mark-{os.getpid()}"
    ends = RIGHT in escape
    found = run_tests(f"import os, time\nheld = open({mark!r}, 'w')\n" + escape, TESTS, SECONDS if ends else 5.0)
    assert found == (PASSED if ends else Judged(0.0, "out of time"))
    deadline = time.monotonic() + 10
    while holders(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not holders(mark)


def test_the_number_of_processes_is_limited() -> None:
    many = "import os, time\nstarted = 0\ntry:\n    for _ in range(200):\n        if os.fork() == 0:\n            time.sleep(999)\n"
    many += "        started += 1\nexcept OSError:\n    pass\n"
    tests = "assert 0 < started < 12"
    assert run_tests(many, tests, SECONDS, Limits(processes=12)) == PASSED


def test_memory_is_limited() -> None:
    assert run_tests("hog = bytearray(2 * 2**30)\n" + RIGHT, TESTS, SECONDS) == WRONG
    assert run_tests("hog = bytearray(2**29)\n" + RIGHT, TESTS, SECONDS) == PASSED


def test_files_are_small_and_gone_afterwards(tmp_path: Path) -> None:
    writes = "open('there', 'wb').write(bytes({size}))\n" + RIGHT
    assert run_tests(writes.format(size=2**20), TESTS + "import os\nassert os.listdir() == ['there']", SECONDS) == PASSED
    assert run_tests(writes.format(size=2**25), TESTS, SECONDS) == WRONG
    assert run_tests("import os\nos.mkdir('a')\nopen('a/b', 'w')\nos.chmod('a', 0)\n" + RIGHT, TESTS, SECONDS) == PASSED


@pytest.mark.skipif(os.geteuid() != 0, reason="a user who is not root writes as itself")
def test_started_by_root_it_owns_nothing(tmp_path: Path) -> None:
    owned = tmp_path.parent / "owned"
    owned.write_text("mine")
    tests = f"import os, pytest\nassert os.getuid() != 0\nwith pytest.raises(OSError):\n    open({str(owned)!r}, 'w')"
    assert run_tests(RIGHT, tests, SECONDS) == PASSED


def test_it_has_the_path_and_no_other_word_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "1")
    assert run_tests("import os\nseen = set(os.environ)", "assert seen - {'LC_CTYPE'} == {'PATH'}", SECONDS) == PASSED


def test_it_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)\n"
        assert run_tests(call + RIGHT, TESTS, SECONDS) == (WRONG if enclosed() else PASSED)


def test_a_runner_that_cannot_start_is_a_failure_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(VerifierFailed, match="before it ran anything"):
        patched.setattr(sandbox_module, "RUNNER", Path("missing.py"))
        run_tests(RIGHT, TESTS, SECONDS)
    with pytest.raises(VerifierFailed, match=r"took 0\.001 s"):
        run_tests(RIGHT, TESTS, 0.001)
    monkeypatch.setattr(sandbox_module.sys, "executable", "/missing/python")
    with pytest.raises(VerifierFailed, match="could not be started"):
        run_tests(RIGHT, TESTS, SECONDS)


def test_no_descriptor_is_left_open() -> None:
    run_tests(RIGHT, TESTS, SECONDS)
    before = len(os.listdir("/proc/self/fd"))
    run_tests(RIGHT, TESTS, SECONDS)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("a\n```\nx = 1\n```\nb\n```python\ny = 2\n```\nc", "y = 2\n"),
        ("<think>\n```\nx = 1\n```\n</think>\ny = 2", "\ny = 2"),
        ("```\nx = 1\n```\nthen\n```\ny =", "x = 1\n"),
        ("", ""),
    ],
)
def test_where_the_code_is_found(text: str, code: str) -> None:
    assert solution_of(text) == code
