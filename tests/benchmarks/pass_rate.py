"""Prompts weighed by how often the student solves them, against the same weights as one number for all, and dealt by lot.

The verifiable task's teacher and begun students, which are in the same scratch folder. Each side goes on from the same student, for as many
steps of as many texts. What is finished stays there (`--folder`) and is not done again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine
from tests.benchmarks.verifiable_task import Bench, over_seeds

NAME = "pass-rate"
SIDES = {"paced": (), "uniform": ("strategy.control=uniform",), "random": ("strategy.control=random",)}
"""Overrides of the recipe."""


def measure(settings: Settings) -> Figure:
    """The table of all sides and seeds; the figure is the share of wrong answers of `paced` over that of `uniform`."""
    os.environ.pop("RAY_ADDRESS", None)
    bench = Bench(settings)

    def run(side: str, seed: int, begun: Path) -> dict[str, float]:
        return bench.run("paced", seed, begun, name=side, more=SIDES[side])

    found = over_seeds(settings, bench, SIDES, run)
    return Figure(
        name=NAME,
        value=ratio(found),
        unit="wrong answers over wrong answers",
        against="the same weights of each step as one number for all of its prompts, from the same student",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "seeds": list(settings.seeds), "teacher": bench.teacher(), "runs": found},
    )


def ratio(found: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """Of means over seeds; NaN where a side was not run, or none of its answers is wrong."""
    wrong = {side: float(np.mean([1 - run["accuracy"] for run in of_seeds])) for side, of_seeds in found.items()}
    return wrong["paced"] / wrong["uniform"] if wrong.get("uniform") and "paced" in wrong else math.nan
