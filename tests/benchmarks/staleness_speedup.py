"""Steps a second with `staleness: 1` over `staleness: 0`: how much of the writing hides behind the training.

Writing and training are stand-ins that sleep equally long, so that nobody waits for a core and the ratio shows the stream alone;
beside it stands the same ratio of real work: GKD of a small student on this machine's cores. Starting up is on neither side.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from orchestrator.config import Job, load_job
from orchestrator.display import Display
from orchestrator.driver import drive
from orchestrator.plan import make_plan
from orchestrator.run import planned_with_ray
from strategies.core import Player, Players, Sampling, Strategy, StrategyConfig, Term, Update
from strategies.head import TermSums
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from strategies.stages.rollout import Rollout
from tests.benchmarks import BENCHMARKS, material
from tests.benchmarks.figure import Figure, Settings, machine, median

NAME = "staleness-speedup"
SECONDS, STEPS, SKIPPED = 0.5, 44, 4
"""A sleep; steps of a run; those at its beginning that are not timed."""
REAL_STEPS = 24


class Sleeping(StrategyConfig):
    """Cross-entropy on what a stand-in wrote, with a sleep before every forward."""

    type: Literal["sleeping"] = "sleeping"
    staleness: int = 0

    def build(self) -> Strategy:
        ce = Term("ce", CrossEntropy(), constant(1.0))

        def loss(players: Players) -> TermSums:
            time.sleep(SECONDS)
            return players.forward("student", (ce,))

        stage = Rollout(Sampling(max_new_tokens=8), staleness=self.staleness)
        return Strategy(players={"student": Player()}, stages=(stage,), updates=(Update("student", (ce,), loss),))


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds of the stand-ins; sides take turns."""
    os.environ.pop("RAY_ADDRESS", None)
    texts = material.standard_library(settings.folder / "material", smoke=True)
    steps = 8 if settings.smoke else STEPS
    sleeping: dict[int, list[float]] = {0: [], 1: []}
    real: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(settings.rounds):
        for staleness in (0, 1):
            job = _sleeping(settings.folder, texts, staleness, steps)
            sleeping[staleness].append(_steps_per_second(job, f"sleeping-{turn}-{staleness}"))
            if not settings.smoke:
                real[staleness].append(_steps_per_second(_real(settings.folder, texts, staleness), f"real-{turn}-{staleness}"))
        print({"sleeping": sleeping, "real": real}, f"load {os.getloadavg()[0]:.1f}", flush=True)
    return Figure(
        name=NAME,
        value=median(sleeping[1]) / median(sleeping[0]),
        unit="steps/s over steps/s",
        against=f"staleness 0; writing and training each sleep {SECONDS} s",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "steps": steps,
            "steps_per_second": sleeping,
            "real_steps_per_second": real,
            "real_ratio": None if settings.smoke else median(real[1]) / median(real[0]),
        },
    )


def _sleeping(folder: Path, texts: material.Material, staleness: int, steps: int) -> Job:
    writer: dict[str, Any] = {"engine": "fake", "vocabulary": material.quickstart.VOCABULARY, "seconds_per_bundle": SECONDS}
    job = _job(folder, {**_content(texts, {"type": "cross-entropy"}, steps), "endpoints": {"student": writer}})
    return job.model_copy(update={"run": job.run.model_copy(update={"strategy": Sleeping(staleness=staleness)})})


def _real(folder: Path, texts: material.Material, staleness: int) -> Job:
    return _job(folder, _content(texts, {"type": "gkd", "max_new_tokens": 48, "staleness": staleness}, REAL_STEPS))


def _job(folder: Path, content: dict[str, Any]) -> Job:
    return load_job(content, cluster={"storage": str(folder / "runs")})


def _content(texts: material.Material, strategy: dict[str, Any], steps: int) -> dict[str, Any]:
    return {
        "student": {"model": str(texts.student)},
        "strategy": strategy,
        "endpoints": {"teacher": {"model": str(texts.teacher)}} if strategy["type"] == "gkd" else {},
        "data": {"train": str(texts.data), "held_out_rows": 8, "max_length_tokens": 96, "max_rows": 4},
        "train": {"steps": steps, "batch_rows": 16, "layout": "single"},
    }


def _steps_per_second(job: Job, name: str) -> float:
    plan = planned_with_ray(job.cluster, lambda: make_plan(job, name), Display())
    result = drive(plan, Display())
    lines = (json.loads(line) for line in (Path(result.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    times = [line["time"] for line in lines if "age_steps" in line["values"]]
    return (len(times) - 1 - SKIPPED) / (times[-1] - times[SKIPPED])
