"""The door: every check of a run before any model loads. Nothing but the prepared-data cache is written here."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.config import EndpointConfig
from cluster.offers import Offer
from cluster.resources import Demand, Share, demands, machine_cpus
from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.checks import machine, networks, recipe, resumed, served, states, teaching
from orchestrator.checks.networks import Cast
from orchestrator.checks.resumed import FACTS, Facts
from orchestrator.config import Job, RunConfig
from orchestrator.data import PreparedData, prepare, tokenizer_digest
from orchestrator.memory import (
    Disk,
    Memory,
    Work,
    disk,
    largest_work,
    scorer_memory,
    small_process,
    stream_bytes,
    surroundings,
    with_frozen,
    worker_memory,
)
from orchestrator.order import Order
from orchestrator.pipeline import StreamSpec
from orchestrator.plan_text import plan_text
from orchestrator.result import RECIPE, RESULT
from orchestrator.teachers import heads_of
from strategies.core import Strategy
from strategies.sources import Taught

__all__ = ["BASELINE", "FACTS", "Plan", "make_order", "make_plan", "plan_text"]

BASELINE = "-baseline"
"""Follows a run's name in that of its control."""


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
    """Token ids, from 0, that student and teachers share."""
    endpoints: Mapping[str, EndpointConfig]
    """Those that stages ask."""
    offers: Mapping[str, Offer]
    """What the servers of those behind a URL give."""
    frozen: Mapping[str, EndpointConfig]
    """Those whose models every training worker loads for its frozen players."""
    loaded: Mapping[str, EndpointConfig]
    """The same, and those whose output heads workers apply; a control has its run's."""
    measured: Mapping[str, Taught]
    """Signals that held-out rows carry; a control has its run's."""
    demands: tuple[Demand, ...]
    held_out: Folder
    """Where scored held-out bundles are kept; a control shares its run's."""
    cast: Cast
    disk: Disk
    memory: tuple[Memory, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """What identifies data, student, tokenizer and each endpoint's model."""
    warnings: tuple[str, ...] = ()
    """What may be meant otherwise, one sentence each."""

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

    @property
    def facts(self) -> Facts:
        """What a resumed run must find again; the driver keeps it as `FACTS`."""
        return Facts(self.fingerprints, self.steps, self.vocabulary, self.job.run.train.workers)

    def stream(self) -> StreamSpec:
        """The run's stream of bundles."""
        return StreamSpec(self.order, self.strategy.stages, self.endpoints, self.shares, self.vocabulary)


def make_plan(job: Job, recipe_name: str, resume: Folder | None = None) -> Plan:
    """Checks a job and lays it out; raises `Refusal` with the first thing that cannot work. Loads no weights.

    The run is called as the recipe says, else after `recipe_name` and the time. With `resume`, the folder of an earlier
    run, it goes on under that run's name, and only settings that leave its result alone may differ.
    """
    run, train, strategy = job.run, job.run.train, job.run.strategy.build()
    warnings = recipe.check_recipe(job) + teaching.check_strategy(job, strategy, train.steps)
    endpoints = teaching.used_endpoints(job, strategy)
    folder = _folder(job, recipe_name, resume)
    wanted = tuple(demands(job.cluster, endpoints, train.workers, machine_cpus()))
    machine.check_packages(train, job.cluster.resources.worker.gpus)
    machine.check_processors(job, wanted)
    frozen = states.frozen_endpoints(job, strategy)
    people, found = networks.cast(job, {**frozen, **endpoints})
    inner = states.check_states(job, strategy, people, frozen)
    added, asked = teaching.rehearse(job, strategy, people.vocabulary, {name: network.hidden for name, network in people.teachers.items()})
    offers, unsure = served.check_servers(endpoints, asked)
    data = prepare(run.data, people.tokenizer, run.seed, _data_cache(job))
    order = make_order(job, data)
    warnings += found + unsure + networks.check_rows(run, people, data) + served.check_lengths(offers, data)
    warnings += recipe.check_order(train, order, data.train.longest_tokens, data.train.tokens / data.train.rows)
    memory, stream = _memory(run, people, largest_work(run, order, endpoints, added), endpoints, wanted, inner)
    written = disk(run, people.student, data, order.steps, added)
    machine.check_disk(job.cluster.storage, written)
    warnings += machine.check_memory(job, memory, stream)
    plan = Plan(
        job=job,
        name=folder.root.rpartition("/")[2],
        folder=folder,
        strategy=strategy,
        data=data,
        order=order,
        vocabulary=people.vocabulary,
        endpoints=endpoints,
        offers=offers,
        frozen=frozen,
        loaded={**{name: endpoints[name] for name in sorted(heads_of(strategy.signals))}, **frozen},
        measured=teaching.measured(strategy),
        demands=wanted,
        held_out=folder.child("held_out"),
        cast=people,
        disk=written,
        memory=memory,
        fingerprints=_fingerprints(people, data),
        warnings=tuple(warnings),
    )
    if resume is not None:
        resumed.check_same_facts(folder, job, plan.facts)
    return plan


def _folder(job: Job, recipe_name: str, resume: Folder | None) -> Folder:
    """The run's folder: a new one that nobody has, or the earlier run's."""
    machine.check_storage(job.cluster.storage)
    if resume is not None:
        resumed.check_resumable(resume, job, RECIPE, RESULT)
        return resume
    stem = re.sub(r"[^\w.+=-]+", "-", recipe_name, flags=re.ASCII).strip("-.") or "run"
    name = job.run.name or f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    recipe.check_name(name)
    names = [name, name + BASELINE] if job.run.baseline else [name]
    machine.check_folders_free([Folder.of(job.cluster.storage, n) for n in names], RESULT)
    return Folder.of(job.cluster.storage, name)


def _data_cache(job: Job) -> Path:
    """Prepared data is mapped into memory, so it lies on a disk even when runs do not."""
    storage = job.cluster.storage
    return Path("runs" if "://" in storage else storage).absolute() / "data"


def make_order(job: Job, data: PreparedData) -> Order:
    """The order in which the run reads its rows."""
    train = job.run.train
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


def _memory(
    run: RunConfig,
    people: Cast,
    work: Work,
    endpoints: Mapping[str, EndpointConfig],
    wanted: tuple[Demand, ...],
    inner: states.Inner,
) -> tuple[tuple[Memory, ...], int]:
    """Peak of every role's process, and bytes of bundles under way."""
    found = [with_frozen(worker_memory(run, people.student, work, wanted[0]), inner.frozen, inner.heads, inner.filters, work)]
    for demand in wanted[1:]:
        model = endpoints[demand.role].saved_model if demand.role in endpoints else None
        found.append(scorer_memory(people.teachers[demand.role], model, work, demand) if model else small_process(demand))
    return (*found, surroundings()), stream_bytes(run, work, wanted)


def _fingerprints(people: Cast, data: PreparedData) -> dict[str, str]:
    teachers = {f"endpoints.{name}": network.fingerprint for name, network in people.teachers.items()}
    return {"data": data.fingerprint, "student": people.student.fingerprint, "tokenizer": tokenizer_digest(people.tokenizer), **teachers}
