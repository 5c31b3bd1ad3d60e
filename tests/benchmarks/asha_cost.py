"""What stopping early saves: core-seconds of a search of eight trials with ASHA over the same eight points without a scheduler.

Both read one finished store, and both find their best on the same held-out rows; the figure carries both qualities.
"""

from __future__ import annotations

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.searches import SCHEDULERS, Metered, best, ended, filled, searched, sizes

NAME = "asha-cost"


def measure(settings: Settings) -> Figure:
    """Core-seconds over core-seconds, medians over the rounds."""
    steps, trials = sizes(settings)
    filled(settings)
    spent: dict[str, list[Metered]] = {side: [] for side in SCHEDULERS}
    found: dict[str, list[float]] = {side: [] for side in SCHEDULERS}
    paused: list[int] = []
    for turn in range(settings.rounds):
        for side in SCHEDULERS:
            took, folder = searched(settings, side, turn)
            ends = ended(folder)
            spent[side].append(took)
            found[side].append(best(ends))
            paused.append(sum(t["outcome"] == "paused" for t in ends))
            print(f"{side}: {took.core_seconds:,.0f} core-seconds, best {found[side][-1]:.4f}", flush=True)
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
            "paused": paused,
        },
    )
