"""Which tests touch what, and one mutant against its tests: each in a process forked after torch was imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import pickle
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, Literal

import pytest

from tests.mutation.mutants import Mutant

ROOT = Path(__file__).parents[2]
TESTS = "tests/strategies"
QUIET = ["-q", "-x", "--no-header", "--no-summary", "--tb=no"]
PYTEST = [*QUIET, "--assert=plain", "-p", "no:cacheprovider", "-p", "no:timeout", "-o", "addopts=--import-mode=importlib"]
SECONDS = 120.0
"""A mutant that runs longer is taken for an endless loop, and for noticed."""
Verdict = Literal["killed", "survived", "untested"]


@dataclass
class Reach:
    """What tests run: for each function of the package, the ids of the tests that call it, and each test's seconds."""

    tests: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    """By path from the root, and qualified name of the function."""
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def of(self, mutant: Mutant) -> list[str]:
        """Tests that could notice a mutant, quick ones first. Outside functions, all of every test file that reaches its
        file, and the tests that call no function at all: they look at classes and their defaults."""
        scopes = [s for path, s in self.tests if path == mutant.path and mutant.scope in ("", s)]
        found = {test for s in scopes for test in self.tests[mutant.path, s]}
        if not mutant.scope:
            files, calling = {_file(test) for test in found}, set().union(*self.tests.values())
            found = {test for test in self.seconds if _file(test) in files or test not in calling}
        return sorted(found, key=lambda test: (self.seconds.get(test, 0.0), test))


class _Recorder:
    """A pytest plugin that notes which functions of `strategies` each test calls."""

    def __init__(self) -> None:
        self.reach = Reach()
        self.known: dict[CodeType, tuple[str, str] | None] = {}
        self.test = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Any:
        self.test, started = item.nodeid, time.perf_counter()
        sys.setprofile(self._note)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.reach.seconds[item.nodeid] = time.perf_counter() - started

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reach.failed.append(report.nodeid)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call":
            return
        if code not in self.known:
            path = Path(code.co_filename)
            inside = path.is_relative_to(ROOT / "strategies")
            self.known[code] = (path.relative_to(ROOT).as_posix(), _outer(code.co_qualname)) if inside else None
        if (place := self.known[code]) is not None:
            self.reach.tests[place].add(self.test)


def _file(test: str) -> str:
    return test.partition("::")[0]


def _outer(name: str) -> str:
    """`Class.method` or `function` around a lambda, comprehension or inner function."""
    return name.partition(".<locals>")[0]


class _Only:
    """A pytest plugin that runs the tests of a set alone, in the order given."""

    def __init__(self, tests: Sequence[str]):
        self.order = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def reach() -> Reach:
    """Runs all tests once, in a process of its own. `SystemExit` when one fails without any mutant."""

    def record(write: Callable[[bytes], object]) -> int:
        recorder = _Recorder()
        code = pytest.main([*PYTEST, str(ROOT / TESTS)], plugins=[recorder])
        found = recorder.reach
        write(pickle.dumps((dict(found.tests), found.seconds, found.failed)))
        return int(code)

    code, data = _forked(record, seconds=1200.0)
    tests, seconds, failed = pickle.loads(data)
    if code or failed:
        raise SystemExit(f"tests fail without any mutant: {', '.join(failed) or code}")
    return Reach(defaultdict(set, tests), seconds, failed)


def judge(mutant: Mutant, tests: Sequence[str]) -> Verdict:
    """Runs tests on a mutant until one fails."""
    if not tests:
        return "untested"

    def run(write: Callable[[bytes], object]) -> int:
        sys.meta_path.insert(0, _Mutated(mutant))
        files = sorted({_file(test) for test in tests})
        return int(pytest.main([*PYTEST, *(str(ROOT / f) for f in files)], plugins=[_Only(tests)]))

    code, _ = _forked(run, SECONDS)
    if code == pytest.ExitCode.OK:
        return "survived"
    if code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED) or code < 0:  # a test, an import, a signal
        return "killed"
    raise SystemExit(f"{mutant}: pytest ended with {code}; expected it to run {len(tests)} tests")


def _forked(work: Callable[[Callable[[bytes], object]], int], seconds: float) -> tuple[int, bytes]:
    """Exit code and what `work` wrote, from a fork whose output is dropped and which is ended after `seconds`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.close(reading)
            signal.alarm(int(seconds))
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            with os.fdopen(writing, "wb") as pipe:
                code = work(pipe.write)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    return (os.waitstatus_to_exitcode(status), data)


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from its mutated source."""

    def __init__(self, mutant: Mutant):
        self.path = ROOT / mutant.path
        self.module = mutant.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.source = mutant.apply(self.path.read_text(encoding="utf-8"))

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)
