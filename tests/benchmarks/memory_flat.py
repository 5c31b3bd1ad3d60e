"""Growth of a run's driver and of its board over 10,000 optimizer steps, which read 1,000,000 rows of the order.

A real run of a very small student without a teacher. The resident memory of both processes is sampled as steps pass, and the median of
the last tenth is compared with that from a fifth of the way on, when everything has been loaded that ever is.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.material import standard_library
from tests.benchmarks.product import Run, Setup, recipe, run

NAME = "memory-flat"
STEPS, ROWS = 10_000, 100
SETUP = Setup("1 worker")
PAUSE_SECONDS = 0.5
MIB = 1 << 20
ROLES = {"driver": "jobs.cli run", "board": "ray::Board"}
Samples = dict[str, list[tuple[float, float]]]


def measure(settings: Settings) -> Figure:
    """The larger growth of both, in MiB."""
    steps, rows = (60, 4) if settings.smoke else (STEPS, ROWS)
    material = standard_library(settings.folder / "material", smoke=True)
    data = {"held_out_rows": 4, "max_length_tokens": 8}
    train = {"batch_rows": rows, "lr": 1e-3, "steps": steps, "micro_batch_tokens": 1024}
    content = recipe(material, SETUP, train, data, {}) | {"strategy": "cross-entropy", "checkpoint": {"every_steps": max(1, steps // 10)}}
    content = {name: value for name, value in content.items() if name != "endpoints"}
    storage = settings.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, settings.folder / "flat", content, SETUP, storage)
        samples = _watched(running, storage)
    done: Run = running.result()
    begins = done.steps()[len(done.steps()) // 5]["time"]
    growth = {role: _growth(found, begins) for role, found in samples.items()}
    return Figure(
        name=NAME,
        value=max(growth.values()),
        unit="MiB",
        against="the same processes a fifth of the way on",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "steps": steps,
            "rows": steps * rows,
            "growth_mib": growth,
            "mib": {role: [round(m, 1) for _, m in found[:: max(1, len(found) // 50)]] for role, found in samples.items()},
            "seconds": done.lines[-1][0] - done.started,
        },
    )


def _watched(running: Future[Run], storage: Path) -> Samples:
    """Unix seconds and MiB of each role's process, as long as the run goes on."""
    found: Samples = {role: [] for role in ROLES}
    while not running.done():
        for process in psutil.Process().children(recursive=True) if list(storage.glob("flat-*/metrics.jsonl")) else ():
            with suppress(psutil.NoSuchProcess):
                words, mib = " ".join(process.cmdline()), process.memory_info().rss / MIB
                roles = [role for role, title in ROLES.items() if title in words]
                found.update({role: [*found[role], (time.time(), mib)] for role in roles})
        time.sleep(PAUSE_SECONDS)
    return found


def _growth(samples: list[tuple[float, float]], begins: float) -> float:
    """Median of the last tenth of the samples, less that of the first tenth after `begins`."""
    later = [mib for when, mib in samples if when >= begins] or [mib for _, mib in samples]
    tenth = max(1, len(later) // 10)
    return median(later[-tenth:]) - median(later[:tenth])
