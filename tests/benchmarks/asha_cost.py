"""What stopping early saves: core-seconds of a search of eight trials with ASHA over the same eight points without a scheduler.

Both read one finished store, and both find their best on the same held-out rows; the figure carries both qualities.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.searches import SPACE, TRIALS, Metered, best, content, ended, metered

NAME = "asha-cost"
STEPS = 600
SIDES: dict[str, Any] = {"none": "none", "asha": {"type": "asha"}}


def measure(settings: Settings) -> Figure:
    """Core-seconds over core-seconds, medians over the rounds."""
    steps, trials = (24, 3) if settings.smoke else (STEPS, TRIALS)
    base = content(settings.folder, steps, settings.smoke)
    storage = settings.folder / "runs"
    metered(settings.folder / "generate", "generate", base, storage)
    spent: dict[str, list[Metered]] = {side: [] for side in SIDES}
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    stopped: list[int] = []
    for turn in range(settings.rounds):
        for side, scheduler in SIDES.items():
            search = {"space": SPACE, "sampler": "random", "trials": trials, "scheduler": scheduler, "baseline": False}
            name = f"{side}{turn}"
            spent[side].append(metered(settings.folder / name, "search", {**base, "name": name, "search": search}, storage))
            ends = ended(storage / name)
            found[side].append(best(ends))
            stopped.append(sum(t["outcome"] == "stopped" for t in ends))
            print(f"{side}: {spent[side][-1].core_seconds:,.0f} core-seconds, best {found[side][-1]:.4f}", flush=True)
    return Figure(
        name=NAME,
        value=median(m.core_seconds for m in spent["asha"]) / median(m.core_seconds for m in spent["none"]),
        unit="core-seconds over core-seconds",
        against="the same trials without a scheduler",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "trials": trials,
            "steps": steps,
            "sides": {side: [vars(m) for m in ms] for side, ms in spent.items()},
            "best_cross_entropy": found,
            "quality_difference": [a / n - 1 for a, n in zip(found["asha"], found["none"], strict=True)],
            "stopped": stopped,
        },
    )
