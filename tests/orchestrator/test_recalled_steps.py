"""Steps of a run that recalls and moves by what it measures, in one process: a run that goes back ends as one that never did."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.endpoints import make_engine
from cluster.engines.fake import FakeEngine
from orchestrator import train
from orchestrator.bundle import HELD_OUT_STEP, from_table, scalar
from orchestrator.controls import Controls
from orchestrator.evaluate import HeldOut
from orchestrator.layouts import Layout
from orchestrator.microbatch import cut_bundle
from orchestrator.plan import Plan
from orchestrator.players import load_players
from orchestrator.reading import read_bundles
from orchestrator.remembering import Remembering, rollout_log
from orchestrator.teachers import Teachers
from orchestrator.train import Networks, Trainer
from orchestrator.wishes import Wish
from orchestrator.worker import WorkerJob
from strategies.core import Columns, Progress
from strategies.objectives.taid import TaidPace, TaidState, taid_update
from strategies.stages.replay import Replay
from strategies.stages.rollout import STUDENT
from tests.orchestrator.bench import Bench

STEPS, CPU = 12, torch.device("cpu")
MOVING = "strategy.student_share={start: 0.6, rise: 0.2, tolerance: -99}"
FAKE = "endpoints.teacher={engine: fake, vocabulary: 512}"
TRAINS = (f"train.steps={STEPS}", "train.lr=1e-2", "train.batch_rows=8", "evaluate.every_steps=3", FAKE)
OLD = ("strategy.replay_rows=6", "strategy.replay_share=0.6", "strategy.staleness=1")
RECALLS = ("strategy=distillm", "strategy.max_new_tokens=8", *OLD, MOVING, *TRAINS)

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Journal:
    """What a run shows of its steps."""

    rank: int = 0
    stop: bool = False
    recent: tuple[Any, ...] = ()
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluations: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def step(self, attempt: int, step: int, metrics: Mapping[str, float]) -> None:
        timeless = {n: v for n, v in metrics.items() if "second" not in n}
        self.steps[step] = timeless

    def evaluated(self, attempt: int, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluations[step] = metrics


class Sender:
    """A publisher that only counts."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def publish(self, step: int) -> None:
        self.sent.append(step)

    def keep(self, folder: Path) -> None:
        raise NotImplementedError


@dataclass
class Kept:
    """A checkpoint."""

    step: int
    state: dict[str, Any]
    controls: dict[str, Any]


class Run:
    """One attempt at a run of a plan, from nothing or from what was kept."""

    def __init__(self, plan: Plan, journal: Journal, kept: Kept | None = None):
        self.plan, self.freshness = plan, plan.freshness(None)
        strategy = self.plan.strategy
        self.players: dict[str, Layout] = load_players(self.plan.job.run, strategy.players, CPU, strategy.updates)
        self.first = kept.step if kept else 0
        if kept:
            self.players["student"].load(copy.deepcopy(kept.state))
        self.controls = Controls(
            strategy.controllers, kept.controls if kept else {}, 1 + (self.freshness.staleness if self.freshness else 0)
        )
        self.controls.send_with(self.first)
        recalling = [s for s in strategy.stages if isinstance(s, Replay)]
        self.memory = Remembering(rollout_log(self.plan.folder), recalling[0], 0) if recalling else None
        if self.memory:
            self.memory.begin(self.first)
        job = WorkerJob(
            run=self.plan.job.run,
            steps=STEPS,
            folder=self.plan.folder,
            held_out=self.plan.held_out,
            board=None,
            threads=1,
            measured=self.plan.measured,
        )
        networks = Networks(self.players, Teachers({**self.plan.measured, **strategy.signals}), CPU)
        self.sender = Sender()
        sender = self.sender if self.freshness else None
        self.trainer = Trainer(job, strategy, networks, journal, self.controls, sender, self.memory)  # type: ignore[arg-type]
        self.engines = {n: make_engine(c) for n, c in self.plan.endpoints.items() if n != STUDENT} | {STUDENT: FakeEngine(512)}

    def bundles(self) -> Iterator[Columns]:
        """As the stream gives them: each step is read when the version that is due for it is out."""
        for table in read_bundles(self.plan.order, self.first, 1, True, self._gate):
            columns = from_table(table)
            for stage in self.plan.strategy.stages:
                if stage.endpoint == STUDENT and self.freshness:
                    columns["policy_version"] = np.asarray([self.freshness.due(scalar(columns, "step"))], np.int64)
                columns = stage(columns, self.engines[stage.endpoint] if stage.endpoint else None)  # type: ignore[arg-type, index]
            yield columns

    def _gate(self, attempt: int, step: int) -> dict[str, float]:
        return self.controls.versions[self.freshness.due(step)] if self.freshness else {}

    def go(self, last: int = STEPS) -> Kept:
        for columns in self.bundles():
            step = scalar(columns, "step")
            if step == HELD_OUT_STEP:
                micros = cut_bundle(self.plan.job.run, columns, self.plan.measured)
                self.trainer.held_out = HeldOut([columns], micros, len(micros))
                continue
            self.trainer.step(step, [columns], 0.0)
            if self.trainer.due(step):
                self.trainer.report(step, 1, Wish.NOTHING)
            if step == last:
                break
        return Kept(last, copy.deepcopy(self.players["student"].state()), json.loads(json.dumps(self.controls.to_json())))


@pytest.fixture(autouse=True)
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.ray.train, "report", lambda *given, **named: None)
    monkeypatch.setattr(train.Notice, "fresh", False)  # Ray's own context is asked, and there is none
    monkeypatch.setattr(train.checkpoint, "save", lambda *given: None)


def test_a_run_that_goes_back_ends_as_one_that_never_did(bench: Bench) -> None:
    whole, again = Journal(), Journal()
    other, first, plan = (bench.plan(*RECALLS, f"name={n}", f"seed={s}") for n, s in (("other", 1), ("whole", 0), ("again", 0)))
    Run(first, whole).go()
    kept = Run(plan, again).go(last=6)
    Run(replace(other, folder=plan.folder, endpoints=plan.endpoints), Journal(), kept).go(last=9)  # leaves other texts behind
    Run(plan, again, kept).go()
    assert again == whole
    shares = [v["control/student_share"] for v in whole.steps.values()]
    assert shares == pytest.approx([0.6] * 6 + [0.8] * 3 + [1.0] * 3), "the first evaluation is remembered"
    recalled = [v["rollout/recalled"] for v in whole.steps.values()]
    assert sum(recalled) > 1 and recalled[:2] == [0, 0]
    ages = [(v["age_steps"], v["oldest_steps"]) for v in whole.steps.values()]
    assert ages[:2] == [(0, 0), (1, 1)] and max(o for _, o in ages) > 2 and all(a <= o for a, o in ages)


def test_an_evaluation_reaches_rows_after_the_lag_of_the_student_that_writes(bench: Bench) -> None:
    run, seen = Run(bench.plan(*RECALLS, "strategy.student_share={start: 0, rise: 1, tolerance: -99}"), Journal()), dict[int, float]()
    train_one = run.trainer.step

    def watched(step: int, bundles: Sequence[Columns], waited: float) -> Wish:
        seen[step] = float(bundles[0]["control/student_share"][0])
        return train_one(step, bundles, waited)

    run.trainer.step = watched  # type: ignore[method-assign]
    run.go()
    assert seen == {step: float(step >= 9) for step in range(1, STEPS + 1)}  # step 9 is due the version after 7 steps, sent out after 6
    assert run.sender.sent == list(range(1, STEPS))


def test_taids_pace_is_that_of_its_losses_and_the_student_learns(bench: Bench) -> None:
    journal, pace = Journal(), TaidPace(start=0.2, rate=0.3, inertia=0.5)
    settings = json.dumps(pace.model_dump())
    Run(bench.plan("strategy=taid", f"strategy.pace={settings}", *TRAINS), journal).go()
    state = TaidState(0.2)
    for step, values in journal.steps.items():
        assert values["control/taid"] == state.share
        state = taid_update(state, values["loss/kd"], Progress(step - 1, STEPS), pace)
    first, *_, last = journal.evaluations.values()
    assert last["eval/forward_kl"] < first["eval/forward_kl"] and 0.9 < state.share <= 1.0
