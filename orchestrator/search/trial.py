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
from pathlib import Path
from typing import Any

from ray import tune

from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.board import Entry
from orchestrator.config import Job, RunConfig, load_job
from orchestrator.display import Display
from orchestrator.driver import control_plan, drive
from orchestrator.errors import Alarmed, DistillError, Interrupted
from orchestrator.journal import Journal
from orchestrator.owner import small_files
from orchestrator.plan import Plan, make_plan
from orchestrator.remembering import newest_commit
from orchestrator.result import RECIPE, RESULT, RunResult
from orchestrator.run import with_texts
from orchestrator.search.book import CONTROL, Book, Trial, run_name
from orchestrator.search.settings import Objective
from orchestrator.search.sharing import seated
from orchestrator.search.space import Content, Point, applied
from strategies.core import Strategy

TIME = "step"
"""What is reported as a trial's age: its own optimizer step, which a restart does not turn back."""
OUTCOME = "outcome"
"""Reported once, with the last metrics."""
GENERATION = "generation"
"""Which of a trial's runs reports."""
CHECKPOINT = "checkpoint"
"""Folder of the checkpoint that goes with a report: a pointer, where a population may go on from it."""
ALL = 10**6
"""Checkpoints that a run keeps where nobody says beforehand which are needed."""


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
    at_once: int = 1
    """Trials that run side by side."""
    every_steps: int = 0
    """Steps from one comparison of a population to the next; 0 where trials do not restart from each other."""
    pooled: tuple[str, ...] = ()
    """Teachers that all trials ask in turns."""

    def job(self, point: Point, name: str | None = None) -> Job:
        """The run that a point stands for; `Refusal` where the recipe does not take its values."""
        content = applied(self.content, point)
        if self.every_steps:  # whatever a pointer may name is kept; the search gives up what none does
            own = content.get("checkpoint") or {}
            content["checkpoint"] = {**own, "every_steps": self.every_steps, "keep": ALL}
        tags = {**(content.get("tags") or {}), "search": self.search}
        return load_job({**content, "name": name, "baseline": False, "tags": tags}, (), self.cluster)

    def recipe(self, point: Point) -> RunConfig:
        """What does outside of the search what a trial with these settings does."""
        return load_job({**applied(self.content, point), "name": None, "baseline": False}, (), self.cluster).run

    def taught(self, point: Point) -> bool:
        """Whether a teacher has a say in the run that a point stands for."""
        return taught(self.job(point).run.build())

    def folder(self, number: int, generation: int = 0) -> Folder:
        """The run folder of a trial."""
        return Folder.of(str(self.cluster["storage"]), run_name(self.search, number, generation))

    @property
    def home_folder(self) -> Folder:
        """The search's own."""
        return Folder.of(str(self.cluster["storage"]), self.search)

    @property
    def own(self) -> Path:
        """The search's own small files."""
        return small_files(self.home_folder)

    def trial(self, number: int, point: Point) -> Trial:
        """A trial as the book has it now, where it may restart; else `point` is all there is to know."""
        known = Book(self.own).get(number) if self.every_steps else None
        return known or Trial(number, point)


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
    generation: int = 0
    begun: int = 0
    """Steps of another trial that the run goes on from."""
    every_steps: int = 0
    """Steps between the checkpoints that are told; 0 where nobody asks for them."""
    folder: Folder | None = None
    """Of the run."""
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    """Reports whose checkpoints are not committed yet, and those after them."""

    def __call__(self, entries: Sequence[Entry]) -> bool:
        for entry in entries:
            if entry.kind == "step" and entry.step > self.begun:
                self.tokens += entry.values["tokens"]
                self.seconds += entry.values["step_seconds"]
            elif entry.kind == "eval":
                self._evaluated(entry)
        self._report()
        return bool(self.trouble)

    def _evaluated(self, entry: Entry) -> None:
        bad = [o.metric for o in self.objectives if not math.isfinite(entry.values.get(o.metric, 0.0))]
        if bad:
            self.trouble = f"{bad[0]} was {entry.values[bad[0]]} at step {entry.step}"
        self.metrics = {**entry.values, "tokens": self.tokens, "seconds": self.seconds}
        if self.step < entry.step < self.steps and not bad:
            self._waiting.append({**self.metrics, TIME: entry.step, GENERATION: self.generation, **self._pointer(entry)})
        self.step = max(self.step, entry.step)

    def _pointer(self, entry: Entry) -> dict[str, str]:
        if self.folder is None or not self.every_steps or entry.step % self.every_steps:
            return {}
        return {CHECKPOINT: self.folder.child(checkpoint.name_of(entry.attempt, entry.step)).root}

    def _report(self) -> None:
        """Tells what waits, in order, as far as its checkpoints are there to go on from."""
        while self._waiting:
            first = self._waiting[0]
            if CHECKPOINT in first and self.folder is not None and newest_commit(self.folder) < first[TIME]:
                return
            tune.report(self._waiting.pop(0))

    @classmethod
    def of(cls, spec: Spec, plan: Plan, trial: Trial) -> Hearing:
        """One that knows what the trial spent before."""
        spent, begun = _spent(spec, trial), trial.restarts[-1].step if trial.restarts else 0
        return cls(
            spec.objectives,
            plan.steps,
            spent["tokens"],
            spent["seconds"],
            step=begun,
            generation=trial.generation,
            begun=begun,
            every_steps=spec.every_steps,
            folder=plan.folder,
        )


def run_trial(config: Mapping[str, Any], spec: Spec) -> None:
    """The function that Tune calls: `config` holds the trial's `number` and its `point`; of the control, the number it is control `of`.

    A trial of a population goes on for as long as the book says that it restarts, however its run before that ended.
    """
    os.chdir(spec.home)
    began, number, point = time.time(), int(config["number"]), dict(config["point"])
    told = -1
    while (trial := spec.trial(number, point)).generation != told:
        told = trial.generation
        tune.report({**_trial(config, spec, trial), GENERATION: told, "wall_seconds": time.time() - began})


def _trial(config: Mapping[str, Any], spec: Spec, trial: Trial) -> dict[str, Any]:
    """Metrics, step and outcome of a trial, which an earlier driver may have seen the end of."""
    folder = spec.folder(trial.number, trial.generation)
    result = folder.read(RESULT)
    if result is not None:
        return finished(spec, RunResult(**json.loads(result)), trial)
    try:
        plan = _control(spec, trial.point, int(config["of"])) if trial.number == CONTROL else _plan(spec, trial)
    except DistillError as error:
        return {TIME: 0, OUTCOME: "failed", "words": str(error)}
    hearing = Hearing.of(spec, plan, trial)
    try:
        drive(plan, Display(), spec.parent, None if trial.number == CONTROL else hearing)
    except (Interrupted, Alarmed) as error:
        outcome = ("failed", hearing.trouble) if hearing.trouble else ("stopped", str(error))
    except DistillError as error:
        outcome = ("failed", str(error))
    else:
        return finished(spec, RunResult(**json.loads(plan.folder.read(RESULT) or b"{}")), trial)
    return {**hearing.metrics, TIME: hearing.step, OUTCOME: outcome[0], "words": outcome[1]}


def finished(spec: Spec, result: RunResult, trial: Trial) -> dict[str, Any]:
    """What a finished run reports: metrics of its exported student, and what the whole trial cost. One that cannot be judged has failed:
    a short run may be over before it hears that it met NaN."""
    spent = {name: value for name, value in _spent(spec, trial).items() if value}
    sizes = [row["parameters"] for row in result.comparison if isinstance(row, dict) and row["who"] == "student"]
    size = {"parameters": float(sizes[0])} if sizes and sizes[0] else {}
    metrics = {**result.metrics, **spent, **size}
    bad = [f"{o.metric} is {metrics.get(o.metric)}" for o in spec.objectives if not math.isfinite(metrics.get(o.metric, math.nan))]
    return {**metrics, TIME: result.steps, OUTCOME: "failed" if bad else "finished", "words": ", ".join(bad)}


def _spent(spec: Spec, trial: Trial) -> dict[str, float]:
    """Tokens and seconds of the steps that a trial's runs made themselves, those that came to nothing included."""
    begun = [0, *(restart.step for restart in trial.restarts)]
    runs = [(small_files(spec.folder(trial.number, generation)), step) for generation, step in enumerate(begun)]
    rows = [row.values for folder, step in runs for row in Journal(folder).rows() if row.step > step]
    return {"tokens": sum(r.get("tokens", 0.0) for r in rows), "seconds": sum(r.get("step_seconds", 0.0) for r in rows)}


def _plan(spec: Spec, trial: Trial) -> Plan:
    """The checked run of a trial, its teachers' texts written; one that was begun goes on, one that restarts has another's checkpoint
    before its own, and the held-out rows that the trial's first run scored."""
    name, folder = run_name(spec.search, trial.number, trial.generation), spec.folder(trial.number, trial.generation)
    begun = folder if folder.exists(RECIPE) else None

    def planned(job: Job) -> Plan:
        return make_plan(job, name, begun)

    plan = seated(with_texts(planned(spec.job(trial.settings, name)), planned, Display())[0], spec.pooled, spec.search, spec.at_once)
    if not trial.restarts:
        return plan
    begins, held_out = Folder(trial.restarts[-1].checkpoint), spec.folder(trial.number).child("held_out")
    return replace(plan, begins=begins, held_out=held_out)


def _control(spec: Spec, point: Point, number: int) -> Plan:
    """The control of a finished trial, whose scored held-out rows it shares."""
    plan = control_plan(make_plan(spec.job(point), f"{spec.search}-of"))
    name = run_name(spec.search, CONTROL)
    run = plan.job.run.model_copy(update={"name": name})
    job = plan.job.model_copy(update={"run": run})
    return replace(plan, job=job, name=name, folder=spec.folder(CONTROL), held_out=spec.folder(number).child("held_out"))
