"""What one teacher for a whole search saves: core-seconds of eight trials over those of the same eight runs, each with its teacher live.

The runs are the trials' own recipes, one command each. Both sides include everything: the interpreter, Ray, scoring, training, export.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine
from tests.benchmarks.searches import SPACE, TRIALS, content, ended, journal, metered

NAME = "search-cost"
STEPS = 900
"""A live run of so many takes three minutes or more on two cores."""


def measure(settings: Settings) -> Figure:
    """Core-seconds over core-seconds."""
    steps, trials = (6, 2) if settings.smoke else (STEPS, TRIALS)
    base = content(settings.folder, steps, settings.smoke)
    storage, load = settings.folder / "runs", os.getloadavg()[0]
    asked = {**base, "name": "search", "search": {"space": SPACE, "sampler": "random", "trials": trials, "baseline": False}}
    searched = metered(settings.folder / "search", "search", asked, storage)
    found = ended(storage / "search")
    apart = []
    for number in range(trials):
        run = yaml.safe_load((storage / f"search-{number:03d}" / "recipe.yaml").read_text(encoding="utf-8"))
        live = {**run, "name": f"live{number}", "signals": "live"}
        apart.append(metered(settings.folder / f"live{number}", "run", live, settings.folder / "apart"))
        print(f"live run {number}: {apart[-1].wall_seconds:,.0f} s, {apart[-1].core_seconds:,.0f} core-seconds", flush=True)
    shares = {
        "live runs": [1 - _steps(settings.folder / "apart" / f"live{n}") / m.wall_seconds for n, m in enumerate(apart)],
        "search": 1 - sum(t["metrics"]["seconds"] for t in found) / searched.wall_seconds,
    }
    return Figure(
        name=NAME,
        value=searched.core_seconds / sum(m.core_seconds for m in apart),
        unit="core-seconds over core-seconds",
        against="the same eight recipes run apart, each with its teacher live",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "load_before": load,
            "trials": trials,
            "steps": steps,
            "search": vars(searched),
            "apart": [vars(m) for m in apart],
            "share_of_wall_time_outside_steps": shares,
        },
    )


def _steps(folder: Path) -> float:
    """Seconds of a run's steps."""
    return sum(values["step_seconds"] for values in journal(folder))
