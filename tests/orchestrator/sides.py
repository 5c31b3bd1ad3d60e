"""Starts a layout harness as three processes, a pair and one alone, and collects what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.harness_layouts import ALONE, PAIR

SIDES = ((PAIR, 0), (PAIR, 1), (ALONE, 0))
Side = tuple[int, int]
"""World size and rank."""
Measured = dict[Side, dict[str, Any]]
"""By name of the case."""


@contextmanager
def run_sides(harness: str, folder: Path) -> Iterator[Callable[[], Measured]]:
    """Runs `python -m harness FOLDER RANK WORLD` for every side; what it yields waits for all of them and reads their answers."""
    processes = {side: _start(harness, folder, side) for side in SIDES}
    try:
        yield lambda: _collect(folder, processes)
    finally:
        for process in processes.values():
            process.kill()


def _start(harness: str, folder: Path, side: Side) -> subprocess.Popen[bytes]:
    world, rank = side
    environment = os.environ | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    with _log(folder, side).open("wb") as log:
        command = [sys.executable, "-m", harness, str(folder), str(rank), str(world)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _log(folder: Path, side: Side) -> Path:
    return folder / f"{side[0]}_{side[1]}.log"


def _collect(folder: Path, processes: Mapping[Side, subprocess.Popen[bytes]]) -> Measured:
    """Fails with the log of the first process that failed: its peers would only wait for it."""
    running = True
    while running:
        running = any(process.poll() is None for process in processes.values())
        for side, process in processes.items():
            assert not process.poll(), f"rank {side[1]} of {side[0]}:\n{_log(folder, side).read_text(encoding='utf-8')[-6000:]}"
        time.sleep(0.2)
    return {(w, r): json.loads((folder / f"{w}_{r}.json").read_text(encoding="utf-8")) for w, r in processes}
