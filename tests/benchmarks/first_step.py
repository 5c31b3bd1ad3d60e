"""Seconds from `distill run` to the end of the first optimizer step, and what they went into.

Every round runs one command with a storage folder of its own, so that data is prepared anew, and one that finds prepared
data there. Models are on disk, and the files that Python reads are in the machine's cache from the second round on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.attempt import ATTEMPTS
from orchestrator.held_out_store import COMPLETE
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.material import standard_library
from tests.benchmarks.product import Run, Setup, recipe, run

NAME = "first-step"
SETUPS = (Setup("1 worker"), Setup("2 workers", workers=2, layout="ddp"))
STEPS = 3
TRAIN = {"batch_rows": 16, "lr": 4e-3, "steps": STEPS}
TARGETS = {"1 worker": 25.0, "2 workers": 35.0}


def measure(settings: Settings) -> Figure:
    """Median seconds with one worker and data that was never prepared."""
    material = standard_library(settings.folder / "material", settings.smoke)
    data = {"held_out_rows": 8 if settings.smoke else 256, "max_length_tokens": 128}
    setups = SETUPS[:1] if settings.smoke else SETUPS
    raw: dict[str, list[dict[str, float]]] = {}
    for turn in range(settings.rounds):
        for setup in setups:
            content = recipe(material, setup, TRAIN, data, {})
            home = settings.folder / f"turn{turn}" / setup.name.replace(" ", "-")
            for state in ("data prepared anew", "data found prepared"):
                parts = breakdown(run(home, content, setup, home / "runs"))
                side = f"{setup.name}, {state}"
                raw.setdefault(side, []).append(parts)
                print(f"{side}: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items()), flush=True)
    return _figure(settings, raw, material.parameters)


def breakdown(done: Run) -> dict[str, float]:
    """Seconds since the command until each thing had happened."""
    folder = done.folder
    marks = {
        "plan printed": done.lines[0][0],
        "stream opened": _written(folder / ATTEMPTS),
        "held-out rows scored": _written(folder / "held_out" / COMPLETE),
        "first step": float(done.steps()[0]["time"]),
        "command over": done.lines[-1][0],
    }
    return {name: when - done.started for name, when in marks.items()}


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _figure(settings: Settings, raw: Mapping[str, list[dict[str, float]]], parameters: Mapping[str, int]) -> Figure:
    medians = {side: {name: median(r[name] for r in rounds) for name in rounds[0]} for side, rounds in raw.items()}
    return Figure(
        name=NAME,
        value=medians["1 worker, data prepared anew"]["first step"],
        unit="seconds",
        against="nothing; a wall clock",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "targets_seconds": TARGETS,
            "median_seconds_until": medians,
            "rounds": raw,
            "parameters": parameters,
        },
    )
