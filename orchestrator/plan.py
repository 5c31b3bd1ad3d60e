"""The door: every check of a run before any model loads, and the plan as a person reads it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.config import EndpointConfig
from cluster.resources import Demand, Share, demands, machine_cpus
from cluster.storage import Folder
from orchestrator import checkpoint, models
from orchestrator.config import Job
from orchestrator.data import PreparedData, prepare
from orchestrator.errors import Refusal
from orchestrator.order import Order
from orchestrator.pipeline import StreamSpec
from strategies.core import Strategy


@dataclass(frozen=True)
class Plan:
    """A checked run."""

    job: Job
    name: str
    folder: Folder
    strategy: Strategy
    data: PreparedData
    order: Order
    vocabulary: int
    endpoints: Mapping[str, EndpointConfig]
    demands: tuple[Demand, ...]
    held_out: Folder
    """Where scored held-out bundles are kept; a control shares its run's."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def local(self) -> Path:
        """Local folder of the run's own small files."""
        return self.folder.local or Path("runs") / self.name

    @property
    def done_steps(self) -> int:
        """Optimizer steps behind the newest committed checkpoint."""
        last = checkpoint.committed(self.folder)
        return checkpoint.read_position(last).step if last else 0

    @property
    def steps(self) -> int:
        return self.order.steps

    @property
    def shares(self) -> Mapping[str, Share]:
        return {d.role: d.share for d in self.demands}

    def stream(self) -> StreamSpec:
        """The run's stream of bundles."""
        return StreamSpec(self.order, self.strategy.stages, self.endpoints, self.shares, self.vocabulary)


def make_plan(job: Job, recipe_name: str, resume: Folder | None = None) -> Plan:
    """Checks a job and lays it out; raises `Refusal` with the first thing that cannot work. Loads no weights."""
    run = job.run
    strategy = run.strategy.build()
    endpoints = _endpoints(job, strategy)
    name = recipe_name if resume else run.name or f"{recipe_name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = resume or Folder.of(job.cluster.storage, name)
    tokenizer = models.load_tokenizer(run.student)
    student = models.load_config(run.student.model, run.student.revision, run.student.trust_remote_code)
    data = prepare(run.data, tokenizer, run.seed, Path(job.cluster.storage) / "data")
    order = make_order(job, data)
    cpus = machine_cpus()
    return Plan(
        job=job,
        name=name,
        folder=folder,
        strategy=strategy,
        data=data,
        order=order,
        vocabulary=student.vocab_size,
        endpoints=endpoints,
        demands=tuple(demands(job.cluster, endpoints, run.train.workers, cpus)),
        held_out=folder.child("held_out"),
    )


def make_order(job: Job, data: PreparedData) -> Order:
    """The order in which the run reads its rows."""
    train = job.run.train
    if (train.steps is None) == (train.epochs is None):
        raise Refusal("train", "both or neither of steps and epochs", "exactly one of them", "Set train.steps or train.epochs.")
    order = Order(
        folder=data.folder,
        seed=job.run.seed,
        steps=train.steps or 1,
        bundles_per_step=train.workers,
        batch_rows=0 if train.batch_tokens else train.batch_rows,
        batch_tokens=train.batch_tokens or 0,
    )
    if train.epochs is None:
        return order
    last = None if train.batch_tokens else round(train.epochs * data.train.rows)
    return replace(order, steps=order.count_steps(train.epochs), last_row=last)


def _endpoints(job: Job, strategy: Strategy) -> dict[str, EndpointConfig]:
    wanted = {s.endpoint for s in strategy.stages if s.endpoint}
    missing = sorted(wanted - set(job.endpoints))
    if missing:
        raise Refusal(
            f"strategy.{job.run.strategy.type}",
            f"the endpoint {missing[0]!r}, which nothing defines",
            f"one of {', '.join(sorted(job.endpoints)) or 'the endpoints of ray_config.yaml or the recipe (none are defined)'}",
            f"Add endpoints.{missing[0]}.model to the recipe or to ray_config.yaml.",
        )
    return {name: job.endpoints[name] for name in sorted(wanted)}


def plan_text(plan: Plan) -> str:
    """The plan as a person reads it."""
    return f"{plan.name}: {plan.steps} steps"
