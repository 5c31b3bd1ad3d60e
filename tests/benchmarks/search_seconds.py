"""How long a search takes from the command to its report: eight trials at the quickstart's size, teacher scoring and control included."""

from __future__ import annotations

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.searches import AT_ONCE, SPACE, TRIALS, best, content, ended, metered

NAME = "search-seconds"
STEPS = 300
"""Those of the quickstart."""


def measure(settings: Settings) -> Figure:
    """Seconds, the median over the rounds; each begins without a store."""
    steps, trials = (6, 2) if settings.smoke else (STEPS, TRIALS)
    base = content(settings.folder, steps, settings.smoke)
    rounds, qualities = [], []
    for turn in range(settings.rounds):
        asked = {**base, "name": "search", "search": {"space": SPACE, "trials": trials, "scheduler": "asha", "concurrent": AT_ONCE}}
        rounds.append(metered(settings.folder / f"round{turn}", "search", asked, settings.folder / f"runs{turn}", fresh=True))
        qualities.append(best(ended(settings.folder / f"runs{turn}" / "search")))
        print(f"{rounds[-1].wall_seconds:,.0f} s, best {qualities[-1]:.4f}", flush=True)
    return Figure(
        name=NAME,
        value=median(m.wall_seconds for m in rounds),
        unit="s",
        against="nothing",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "trials": trials,
            "steps": steps,
            "rounds": [vars(m) for m in rounds],
            "best_cross_entropy": qualities,
        },
    )
