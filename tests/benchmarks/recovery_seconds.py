"""Seconds from SIGKILL of a training worker to the end of the next optimizer step: noticing, a new worker, its student and checkpoint,
a stream that begins again, and a step.

With a stored signal, and beside it with a live teacher, which loads again with the stream. Steps before the last checkpoint are not
counted twice: the next step is the first after that checkpoint.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.material import standard_library
from tests.benchmarks.product import Run, Setup, recipe, run

NAME = "recovery-seconds"
SETUP = Setup("1 worker")
EVERY, KILLED_AFTER, STEPS = 10, 14, 40
TRAIN = {"batch_rows": 16, "lr": 4e-3, "steps": STEPS}
SIDES = {"stored": "store", "live": "live"}
WAIT_SECONDS = 300.0


def measure(settings: Settings) -> Figure:
    """Median seconds with a stored signal."""
    material = standard_library(settings.folder / "material", settings.smoke)
    data = {"held_out_rows": 8 if settings.smoke else 64, "max_length_tokens": 128, "max_rows": 8 if settings.smoke else 60}
    raw: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(settings.rounds):
        for side, mode in SIDES.items():
            content = recipe(material, SETUP, TRAIN, data, {}) | {"signals": mode, "checkpoint": {"every_steps": EVERY}}
            raw[side].append(_recovery(settings.folder / f"{side}{turn}", content, settings.folder / "runs"))
            print(f"{side}: {raw[side][-1]}", flush=True)
    medians = {side: median(r["seconds"] for r in rounds) for side, rounds in raw.items()}
    return Figure(
        name=NAME,
        value=medians["stored"],
        unit="seconds",
        against="nothing; a wall clock",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "median_seconds": medians, "rounds": raw, "parameters": material.parameters},
    )


def _recovery(home: Path, content: Mapping[str, Any], storage: Path) -> dict[str, float]:
    """Runs a recipe, kills its training worker once, and returns what that cost."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, home, content, SETUP, storage)
        killed = _kill(home.name, storage)
        done: Run = running.result()
    again = [s for s in done.steps() if s["attempt"] == 2]
    opened = (done.folder / "attempts").stat().st_mtime
    return {"seconds": again[0]["time"] - killed, "stream opened after": opened - killed, "step": again[0]["step"]}


def _kill(name: str, storage: Path) -> float:
    """Sends SIGKILL once the run has reached its step; Unix seconds."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        journals = [path for path in storage.glob(f"{name}-*/metrics.jsonl") if _steps(path) >= KILLED_AFTER]
        if journals:
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
            workers[-1].send_signal(signal.SIGKILL)
            return time.time()
        time.sleep(0.02)
    raise SystemExit(f"{name} did not reach step {KILLED_AFTER} in {WAIT_SECONDS:g} seconds")


def _steps(journal: Path) -> int:
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    return max((line["step"] for line in lines if "step_seconds" in line["values"]), default=0)
