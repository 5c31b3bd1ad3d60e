"""One trial: an ordinary run with its own folder, journal and MLflow child, driven inside a function that Ray Tune calls.

Tune judges what the function reports at every held-out evaluation. Whoever is to stop is told through its run's own board, writes a
checkpoint and ends as an interrupted run does: nothing has to be killed, and `distill run --resume` goes on with it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray import tune

from cluster.storage import Folder
from orchestrator.board import Entry
from orchestrator.config import Job, load_job
from orchestrator.display import Display
from orchestrator.driver import control_plan, drive
from orchestrator.errors import Alarmed, DistillError, Interrupted
from orchestrator.journal import Journal
from orchestrator.plan import Plan, make_plan
from orchestrator.result import RECIPE, RESULT, RunResult
from orchestrator.run import with_texts
from orchestrator.search.book import CONTROL, run_name
from orchestrator.search.settings import Objective
from orchestrator.search.space import Content, Point, applied
from strategies.core import Strategy

TIME = "step"
"""What is reported as a trial's age: its own optimizer step, which a restart does not turn back."""
OUTCOME = "outcome"
"""Reported once, with the last metrics."""


@dataclass(frozen=True)
class Spec:
    """What every trial of a search is told."""

    search: str
    """Name of the search, with which its runs' names begin."""
    content: Content
    """The recipe as it is written, without its search."""
    cluster: Mapping[str, Any]
    """Content of `ray_config.yaml`, its storage absolute."""
    home: str
    """Folder that relative paths of the recipe are taken from."""
    objectives: tuple[Objective, ...]
    parent: str | None = None
    """MLflow run of the search."""

    def job(self, point: Point, name: str | None = None) -> Job:
        """The run that a point stands for; `Refusal` where the recipe does not take its values."""
        content = applied(self.content, point)
        tags = {**(content.get("tags") or {}), "search": self.search}
        return load_job({**content, "name": name, "baseline": False, "tags": tags}, (), self.cluster)

    def taught(self, point: Point) -> bool:
        """Whether a teacher has a say in the run that a point stands for."""
        return taught(self.job(point).run.build())

    def folder(self, number: int) -> Folder:
        """The run folder of a trial."""
        return Folder.of(str(self.cluster["storage"]), run_name(self.search, number))


def taught(strategy: Strategy) -> bool:
    """Whether there is a teacher that a control would do without."""
    return bool(strategy.signals or strategy.stages) or any(not p.trained for p in strategy.players.values())


@dataclass
class Hearing:
    """Reports a run's evaluations to Tune as they come, and says when it is of no use to go on."""

    objectives: tuple[Objective, ...]
    steps: int
    tokens: float = 0.0
    seconds: float = 0.0
    step: int = 0
    """The latest that was reported."""
    metrics: dict[str, float] = field(default_factory=dict)
    trouble: str = ""

    def __call__(self, entries: Sequence[Entry]) -> bool:
        for entry in entries:
            if entry.kind == "step":
                self.tokens += entry.values["tokens"]
                self.seconds += entry.values["step_seconds"]
            elif entry.kind == "eval":
                self._evaluated(entry)
        return bool(self.trouble)

    def _evaluated(self, entry: Entry) -> None:
        bad = [o.metric for o in self.objectives if not math.isfinite(entry.values.get(o.metric, 0.0))]
        if bad:
            self.trouble = f"{bad[0]} was {entry.values[bad[0]]} at step {entry.step}"
        self.metrics = {**entry.values, "tokens": self.tokens, "seconds": self.seconds}
        if self.step < entry.step < self.steps and not bad:
            tune.report({**self.metrics, TIME: entry.step})
        self.step = max(self.step, entry.step)

    @classmethod
    def of(cls, spec: Spec, plan: Plan) -> Hearing:
        """One that knows what the run spent before it was interrupted."""
        rows = [row.values for row in Journal(plan.local).rows()]
        spent = {name: sum(row.get(name, 0.0) for row in rows) for name in ("tokens", "step_seconds")}
        return cls(spec.objectives, plan.steps, spent["tokens"], spent["step_seconds"])


def run_trial(config: Mapping[str, Any], spec: Spec) -> None:
    """The function that Tune calls: `config` holds the trial's `number` and its `point`; of the control, the number it is control `of`."""
    os.chdir(spec.home)
    began = time.time()
    tune.report({**_trial(config, spec), "wall_seconds": time.time() - began})


def _trial(config: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Metrics, step and outcome of a trial, which an earlier driver may have seen the end of."""
    number = int(config["number"])
    result = spec.folder(number).read(RESULT)
    if result is not None:
        return finished(spec, RunResult(**json.loads(result)), spec.folder(number))
    try:
        plan = _plan(config, spec)
    except DistillError as error:
        return {TIME: 0, OUTCOME: "failed", "words": str(error)}
    hearing = Hearing.of(spec, plan)
    try:
        drive(plan, Display(), spec.parent, None if number == CONTROL else hearing)
    except (Interrupted, Alarmed) as error:
        outcome = ("failed", hearing.trouble) if hearing.trouble else ("stopped", str(error))
    except DistillError as error:
        outcome = ("failed", str(error))
    else:
        return finished(spec, RunResult(**json.loads(plan.folder.read(RESULT) or b"{}")), plan.folder)
    return {**hearing.metrics, TIME: hearing.step, OUTCOME: outcome[0], "words": outcome[1]}


def finished(spec: Spec, result: RunResult, folder: Folder) -> dict[str, Any]:
    """What a finished run reports: metrics of its exported student, and what the whole run cost. One that cannot be judged has failed:
    a short run may be over before it hears that it met NaN."""
    rows = [row.values for row in Journal(folder.local).rows()] if folder.local else []
    spent = {"tokens": sum(r.get("tokens", 0.0) for r in rows), "seconds": sum(r.get("step_seconds", 0.0) for r in rows)}
    sizes = [row["parameters"] for row in result.comparison if isinstance(row, dict) and row["who"] == "student"]
    size = {"parameters": float(sizes[0])} if sizes and sizes[0] else {}
    metrics = {**result.metrics, **(spent if rows else {}), **size}
    bad = [f"{o.metric} is {metrics.get(o.metric)}" for o in spec.objectives if not math.isfinite(metrics.get(o.metric, math.nan))]
    return {**metrics, TIME: result.steps, OUTCOME: "failed" if bad else "finished", "words": ", ".join(bad)}


def _plan(config: Mapping[str, Any], spec: Spec) -> Plan:
    """The checked run of a trial, its teachers' texts written; one that was begun goes on."""
    number, point = int(config["number"]), dict(config["point"])
    if number == CONTROL:
        return _control(spec, point, int(config["of"]))
    name, folder = run_name(spec.search, number), spec.folder(number)
    begun = folder if folder.exists(RECIPE) else None

    def planned(job: Job) -> Plan:
        return make_plan(job, name, begun)

    return with_texts(planned(spec.job(point, name)), planned, Display())[0]


def _control(spec: Spec, point: Point, number: int) -> Plan:
    """The control of a finished trial, whose scored held-out rows it shares."""
    plan = control_plan(make_plan(spec.job(point), f"{spec.search}-of"))
    name = run_name(spec.search, CONTROL)
    run = plan.job.run.model_copy(update={"name": name})
    job = plan.job.model_copy(update={"run": run})
    return replace(plan, job=job, name=name, folder=spec.folder(CONTROL), held_out=spec.folder(number).child("held_out"))
