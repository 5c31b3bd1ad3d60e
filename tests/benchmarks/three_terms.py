"""What two more terms cost: forward KL, cross-entropy and reverse KL in one pass of the head over forward KL alone.

Both divergences read the same teacher's top 64 with a bucket, at vocabulary 131,072, 2,048 tokens and width 1,024. At the
quickstart's size, where matrix products are small, the same ratio is given beside it.
"""

from __future__ import annotations

from dataclasses import replace

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.head import HeadSpec, answers, large, small

NAME = "three-terms"
ONE, THREE = "chunked topk", "chunked topk, three terms"


def measure(settings: Settings) -> Figure:
    cases = {"large": large("seconds", settings.smoke), "quickstart": small("seconds", settings.smoke)}
    figures = {name: _seconds(settings, case) for name, case in cases.items()}
    return Figure(
        name=NAME,
        value=figures["large"][THREE] / figures["large"][ONE],
        unit="seconds over seconds",
        against="one of the three terms alone",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "ratios": {name: found[THREE] / found[ONE] for name, found in figures.items()},
            "median_seconds": figures,
            "cases": {name: vars(replace(case, side="")) for name, case in cases.items()},
        },
    )


def _seconds(settings: Settings, case: HeadSpec) -> dict[str, float]:
    return {side: median(a.value for a in found) for side, found in answers(settings, case, [ONE, THREE]).items()}
