"""The door: every check of a run before any model loads. Nothing but the prepared-data cache is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.codecs import codec_for
from cluster.config import EndpointConfig
from cluster.offers import Offer, WritingOffer
from cluster.resources import Demand, Share, demands, machine_cpus
from cluster.storage import Folder
from orchestrator import authored, checkpoint, following, row_losses, stores
from orchestrator.author import KeepTexts
from orchestrator.authored import Text
from orchestrator.capture import KeepSignals
from orchestrator.checks import alarms, authors, curriculum, machine, networks, recipe, rehearsal, resumed, served, states, teaching
from orchestrator.checks.folders import BASELINE, run_folder
from orchestrator.checks.networks import Cast
from orchestrator.checks.resumed import FACTS, SIGNALS, Facts
from orchestrator.config import Job
from orchestrator.curricula import feedback_lag, make_order
from orchestrator.data import PreparedData, prepare, tokenizer_digest
from orchestrator.filling import Filling
from orchestrator.memory import (
    Disk,
    Memory,
    Work,
    disk,
    following_memory,
    largest_work,
    part_work,
    published_bytes,
    scorer_memory,
    small_process,
    stream_bytes,
    surroundings,
    with_averages,
    with_frozen,
    worker_memory,
)
from orchestrator.order import Order
from orchestrator.pipeline import StreamSpec
from orchestrator.plan_text import plan_text
from orchestrator.remembering import about_memory, with_log
from orchestrator.rollouts import equipped, longest_rows, read_rows
from orchestrator.stores import Sources
from orchestrator.teachers import heads_of
from orchestrator.tokenizers import with_tokenizers
from orchestrator.versions import Freshness
from strategies.core import Strategy
from strategies.sources import Taught

__all__ = ["BASELINE", "FACTS", "Plan", "make_plan", "plan_text"]


@dataclass(frozen=True)
class Plan:
    """A checked run."""

    job: Job
    name: str
    folder: Folder
    strategy: Strategy
    data: PreparedData
    order: Order
    endpoints: Mapping[str, EndpointConfig]
    """Those that stages name."""
    text: Text | None
    """What teachers write for the run before it trains; None when nobody does."""
    sources: Sources
    """Who answers for them: teachers or signal stores."""
    offers: Mapping[str, Offer | WritingOffer]
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
    def vocabulary(self) -> int:
        """Token ids, from 0, that student and teachers share."""
        return self.cast.vocabulary

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

    def stream(self, freshness: Freshness | None = None) -> StreamSpec:
        """The run's stream of bundles."""
        answering, weights = self.sources.answering, following.weight_sets(self.strategy)
        return StreamSpec(self.order, self.strategy.stages, answering, self.shares, self.vocabulary, freshness, weights)

    def freshness(self, board: Any) -> Freshness | None:
        """How old the student may be that writes, and what controllers said, by the versions that `board` knows; None where neither
        matters to the rows of a step."""
        return following.freshness(self.strategy, board, feedback_lag(self.job.run))

    def captures(self) -> list[Filling]:
        """What fills the stores that the run reads and that are not there whole."""
        codec = self.job.run.signals.codec
        keeps = [KeepSignals(w.stage.signal, codec_for(codec, w.stage.request, w.spec.key.vocabulary)) for w in self.sources.captures]
        wanted = zip(self.sources.captures, keeps, strict=True)
        return [Filling.by(self.job, w.files, w.spec, w.stage, keep, self.data.folder) for w, keep in wanted]

    def writings(self) -> list[Filling]:
        """What fills the text stores that the run trains on and that are not there whole."""
        if self.text is None:
            return []
        keeps = [KeepTexts(w.authored.write.sampling.samples, w.spec.key.vocabulary) for w in self.text.missing]
        wanted = zip(self.text.missing, keeps, strict=True)
        prompts = self.text.prompts
        return [
            Filling.by(self.job, w.files, w.spec, w.authored.write, keep, prompts.folder, prompts.tokenizer_folder) for w, keep in wanted
        ]


def make_plan(job: Job, recipe_name: str, resume: Folder | None = None) -> Plan:
    """Checks a job and lays it out; raises `Refusal` with the first thing that cannot work. Loads no weights.

    The run is called as the recipe says, else after `recipe_name` and the time. With `resume`, the folder of an earlier
    run, it goes on under that run's name, and only settings that leave its result alone may differ.
    """
    run, train, strategy = job.run, job.run.train, job.run.build()
    warnings = recipe.check_recipe(job) + teaching.check_strategy(job, strategy, train.steps)
    folder = run_folder(job, recipe_name, resume)
    endpoints = with_log(teaching.used_endpoints(job, strategy), strategy, folder)
    stores.check_named_stores(endpoints)
    machine.check_packages(train, job.cluster.resources.worker.gpus)
    frozen, writing = states.frozen_endpoints(job, strategy), authored.writers(job, strategy)
    people, found = networks.cast(job, {**frozen, **writing, **row_losses.asked(job), **endpoints}, strategy.follows)
    strategy = equipped(job, strategy, people.tokenizer, people.contexts)
    inner, (added, asked) = states.check_states(job, strategy, people, frozen), rehearsal.rehearse(job, strategy, endpoints, people)
    text, data, silent = _rows(job, strategy, people)
    found_sources = _sources(job, strategy, people, data, endpoints, resume)
    answering = {name: endpoints.get(name, job.endpoints[name]) for name in found_sources.asked}
    offers, unsure = served.check_endpoints(answering, asked, strategy, people, data)
    order = make_order(job.run, data, row_losses.losses_name(found_sources.losses))
    wanted = tuple(demands(job.cluster, found_sources.answering, train.workers, machine_cpus()))
    warnings += found + silent + unsure + networks.check_rows(run, people, data) + served.check_lengths(offers, data, strategy)
    warnings += recipe.check_order(train, order, data.train.longest_tokens, data.train.tokens / data.train.rows)
    work = _work(job, strategy, order, found_sources, added)
    memory, heavy = _fits(job, people, work, found_sources, wanted, inner, added)
    plan = Plan(
        job=job,
        name=folder.root.rpartition("/")[2],
        folder=folder,
        strategy=strategy,
        data=data,
        order=order,
        endpoints=endpoints,
        text=text,
        sources=found_sources,
        offers=offers,
        frozen=frozen,
        loaded={**{name: endpoints[name] for name in sorted(heads_of(strategy.signals))}, **frozen},
        measured=teaching.measured(strategy),
        demands=wanted,
        held_out=folder.child("held_out"),
        cast=people,
        disk=_disk(job, people, data, order, added),
        memory=memory,
        fingerprints={**_fingerprints(people, data, text), **{SIGNALS + n: d for n, d in found_sources.digests.items()}},
        warnings=(*warnings, *heavy, *about_memory(strategy, order, data), *alarms.about_alarms(run, order.steps, data.held_out.rows)),
    )
    resumed.check_same_facts(folder, job, plan.facts)
    return plan


def _rows(job: Job, strategy: Strategy, people: Cast) -> tuple[Text | None, PreparedData, list[str]]:
    """The rows to train on, the text that they are made of where teachers write it, and warnings about who writes and what is drawn."""
    cache, data = _data_cache(job), job.run.data
    text = authored.prepare_text(job, strategy, people, cache)
    offers, warnings = authors.check_authors(job, people, text)
    told = replace(text, offers=offers) if text else None
    rows = prepare(told.data if told else data, people.tokenizer, data.split_seed, cache)
    return told, rows, warnings + curriculum.check_rows(job, rows)


def _sources(
    job: Job, strategy: Strategy, people: Cast, data: PreparedData, endpoints: Mapping[str, EndpointConfig], resume: Folder | None
) -> Sources:
    """Who answers the stages, and whose losses order the rows."""
    reading = with_tokenizers(endpoints, people.tokenizer, _data_cache(job))
    found = stores.sources(job, strategy, people, data, reading, resumed.signals_before(resume))
    return row_losses.with_losses(job, people, data, found)


def _work(job: Job, strategy: Strategy, order: Order, found: Sources, added: int) -> Work:
    """The most that processes have in hand at once."""
    become, read = partial(longest_rows, strategy), partial(read_rows, strategy)
    return largest_work(job.run, order, found.answering, added, become, strategy.rows_together, read)


def _disk(job: Job, people: Cast, data: PreparedData, order: Order, added: int) -> Disk:
    """What the run will write, after a check that it fits."""
    written = disk(job.run, people.student, data, order.steps, added)
    machine.check_disk(job.cluster.storage, written)
    return written


def _data_cache(job: Job) -> Path:
    """Prepared data is mapped into memory, so it lies on a disk even when runs do not."""
    storage = job.cluster.storage
    return Path("runs" if "://" in storage else storage).absolute() / "data"


def _fits(
    job: Job, people: Cast, work: Work, found: Sources, wanted: tuple[Demand, ...], inner: states.Inner, added: int
) -> tuple[tuple[Memory, ...], list[str]]:
    """Peak of every role's process in training, after checks that processes fit, then and while stores are filled."""
    run, strategy = job.run, job.run.build()
    moving, averages = following.weight_sets(strategy), len(following.average_rates(strategy))
    machine.check_processors(job, wanted)
    worker = with_frozen(worker_memory(run, people.student, work, wanted[0]), inner.frozen, inner.heads, inner.filters, work)
    scorers = _scorers(people, found.answering, work, wanted[1:])
    memory = (
        with_averages(worker, people.student, averages),
        *(following_memory(m, people.student) if m.role in moving else m for m in scorers),
        surroundings(published_bytes(people.student, following.versions(strategy), averages)),
    )
    heavy = machine.check_memory(job, memory, stream_bytes(run, work, wanted))
    asked = {w.spec.name: job.endpoints[w.spec.name] for w in found.captures}
    before = demands(job.cluster, asked, 0, machine_cpus())[1:]
    parts = part_work(work, asked, run.signals.part_tokens, added)
    machine.check_processors(job, before)
    machine.check_memory(job, [*_scorers(people, asked, parts, before), surroundings()], 0)
    return memory, heavy


def _scorers(people: Cast, endpoints: Mapping[str, EndpointConfig], work: Work, wanted: Sequence[Demand]) -> list[Memory]:
    """Peaks of the processes that answer, and of the reader."""
    models = {name: config.saved_model for name, config in endpoints.items()}
    found = []
    for demand in wanted:
        model = models.get(demand.role)
        found.append(scorer_memory(people.teachers[demand.role], model, work, demand) if model else small_process(demand))
    return found


def _fingerprints(people: Cast, data: PreparedData, text: Text | None) -> dict[str, str]:
    teachers = {f"endpoints.{name}": network.fingerprint for name, network in people.teachers.items()}
    return {
        "data": data.fingerprint,
        "student": people.student.fingerprint,
        "tokenizer": tokenizer_digest(people.tokenizer),
        **teachers,
        **(text.digests if text else {}),
    }
