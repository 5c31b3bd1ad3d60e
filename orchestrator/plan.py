"""The door: every check of a run before any model loads. Nothing but the prepared-data cache is written here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.codecs import codec_for
from cluster.config import EndpointConfig
from cluster.offers import Offer, WritingOffer
from cluster.pool import Seat
from cluster.resources import Demand, Share, demands, machine_cpus
from cluster.storage import Folder
from orchestrator import alignment, authored, checkpoint, following, row_losses, stores
from orchestrator.alignment import Alignment
from orchestrator.answers import Answers
from orchestrator.author import KeepTexts
from orchestrator.authored import Text
from orchestrator.capture import KeepSignals
from orchestrator.checks import alarms, authors, curriculum, machine, networks, recipe, rehearsal, resumed, room, served, states, teaching
from orchestrator.checks.answers import check_answers
from orchestrator.checks.folders import BASELINE, run_folder
from orchestrator.checks.networks import Cast
from orchestrator.checks.resumed import FACTS, SIGNALS, Facts
from orchestrator.config import Job
from orchestrator.curricula import feedback_lag, make_order
from orchestrator.data import PreparedData, prepare, tokenizer_digest
from orchestrator.filling import Filling
from orchestrator.memory import Disk, Memory
from orchestrator.order import Order
from orchestrator.owner import small_files
from orchestrator.pipeline import StreamSpec, pools
from orchestrator.plan_text import plan_text
from orchestrator.reading import place_of_rows
from orchestrator.remembering import about_memory, with_log
from orchestrator.rollouts import equipped, within
from orchestrator.stores import Sources
from orchestrator.teachers import heads_of
from orchestrator.tokenizers import with_tokenizers
from orchestrator.versions import Freshness
from strategies.core import Strategy
from strategies.sources import Taught
from strategies.stages import align
from strategies.stages.support import with_vocabulary

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
    alignments: tuple[Alignment, ...]
    """How the rows align with teachers that have tokenizers of their own."""
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
    answers: Answers | None
    """How the student answers held-out prompts; a control does so, too."""
    demands: tuple[Demand, ...]
    held_out: Folder
    """Where scored held-out bundles are kept; a control shares its run's."""
    cast: Cast
    disk: Disk
    memory: tuple[Memory, ...]
    seats: Mapping[str, Seat] = field(default_factory=dict)
    """Places at pools of teachers that other runs ask, too, by endpoint."""
    begins: Folder | None = None
    """Checkpoint of another run that this one goes on from, whatever its own settings said before."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """What identifies data, student, tokenizer and each endpoint's model."""
    warnings: tuple[str, ...] = ()
    """What may be meant otherwise, one sentence each."""

    @property
    def local(self) -> Path:
        """Local folder of the run's own small files."""
        return small_files(self.folder)

    @property
    def vocabulary(self) -> int:
        """Token ids, from 0, that student and teachers share."""
        return self.cast.vocabulary

    @property
    def done_steps(self) -> int:
        """Optimizer steps behind the newest committed checkpoint."""
        last = checkpoint.committed(self.folder) or self.begins
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
        return Facts(self.fingerprints, self.steps, self.vocabulary, self.job.run.train.most_workers)

    def stream(self, freshness: Freshness | None = None) -> StreamSpec:
        """The run's stream of bundles."""
        answering, weights = self.sources.answering, following.weight_sets(self.strategy)
        foreign, stages = self.cast.foreign, self.strategy.stages
        place = place_of_rows(self.folder.root)
        return StreamSpec(self.order, stages, answering, self.shares, self.vocabulary, freshness, weights, foreign, self.seats, place)

    def freshness(self, board: Any) -> Freshness | None:
        """How old the student may be that writes, and what controllers said, by the versions that `board` knows; None where neither
        matters to the rows of a step."""
        found = following.freshness(self.strategy, board, feedback_lag(self.job.run))
        way = self.job.cluster.weights_transport
        return found if found is None or way == "object_store" else replace(found, transport=way)

    def captures(self) -> list[Filling]:
        """What fills the stores that the run reads and that are not there whole."""
        codec = self.job.run.signals.codec
        asked = [(w.stage, codec_for(codec, w.stage.request, w.spec.key.vocabulary)) for w in self.sources.captures]
        keeps = [KeepSignals(stage.signal, stage.request.answers, codec) for stage, codec in asked]
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
    machine.check_packages(train, job.cluster)
    people, frozen, strategy, found = _meet(job, strategy, endpoints)
    inner, (added, asked) = states.check_states(job, strategy, people, frozen), rehearsal.rehearse(job, strategy, endpoints, people)
    text, data, silent = _rows(job, strategy, people)
    strategy, alignments = alignment.measured(job, strategy, people, data, _data_cache(job))
    added = max(added, alignment.laid_bytes(strategy, people, alignments))
    found_sources = _sources(job, strategy, people, data, endpoints, resume)
    offers, unsure = served.check_endpoints({n: (job.endpoints | endpoints)[n] for n in found_sources.asked}, asked, strategy, people, data)
    order = make_order(job.run, data, row_losses.losses_name(found_sources.losses))
    strategy = within(strategy, served.scoring_rooms(endpoints, offers, people))
    wanted = tuple(demands(job.cluster, found_sources.answering, train.fewest_workers, machine_cpus(), pools(strategy.stages)))
    warnings += found + silent + unsure + networks.check_rows(run, people, data) + served.check_lengths(offers, data, strategy)
    warnings += recipe.check_order(train, order, data.train.longest_tokens, data.train.tokens / data.train.rows)
    memory, heavy = room.fits(job, people, room.work(job, strategy, order, found_sources, added), found_sources, wanted, inner, added)
    plan = Plan(
        job=job,
        name=folder.root.rpartition("/")[2],
        folder=folder,
        strategy=strategy,
        data=data,
        order=order,
        endpoints=endpoints,
        text=text,
        alignments=alignments,
        sources=found_sources,
        offers=offers,
        frozen=frozen,
        loaded={**{name: endpoints[name] for name in sorted(heads_of(strategy.signals))}, **frozen},
        measured=teaching.measured(strategy),
        answers=check_answers(job, people, data, _data_cache(job)),
        demands=wanted,
        held_out=folder.child("held_out"),
        cast=people,
        disk=room.on_disk(job, people, data, order, added),
        memory=memory,
        fingerprints=_fingerprints(people, data, text, found_sources, {**frozen, **endpoints}),
        warnings=(*warnings, *heavy, *about_memory(strategy, order, data), *alarms.about_alarms(run, order.steps, data.held_out.rows)),
    )
    resumed.check_same_facts(folder, job, plan.facts)
    return plan


def _meet(
    job: Job, strategy: Strategy, endpoints: Mapping[str, EndpointConfig]
) -> tuple[Cast, Mapping[str, EndpointConfig], Strategy, list[str]]:
    """Who takes part, the endpoints of frozen players, the strategy that knows of tokens and texts what its stages need, and warnings."""
    stores.check_named_stores(endpoints)
    frozen = states.frozen_endpoints(job, strategy)
    everybody = {**frozen, **authored.writers(job, strategy), **row_losses.asked(job), **endpoints}
    people, warnings = networks.cast(job, everybody, strategy.follows, align.foreign(strategy.stages))
    known = with_vocabulary(equipped(job, strategy, people.tokenizer), people.vocabulary)
    return people, frozen, alignment.told(job, known, people), warnings


def _rows(job: Job, strategy: Strategy, people: Cast) -> tuple[Text | None, PreparedData, list[str]]:
    """The rows to train on, the text that they are made of where teachers write it, and warnings about who writes and what is drawn."""
    cache, data = _data_cache(job), job.run.data
    text = authored.prepare_text(job, strategy, people, cache)
    offers, warnings = authors.check_authors(job, people, text)
    authors.check_ends(job, strategy, people)
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


def _data_cache(job: Job) -> Path:
    """Prepared data is mapped into memory, so it lies on a disk even when runs do not."""
    return job.cluster.small_files / "data"


def _fingerprints(
    people: Cast, data: PreparedData, text: Text | None, found: Sources, endpoints: Mapping[str, EndpointConfig]
) -> dict[str, str]:
    teachers = {f"endpoints.{name}": network.fingerprint for name, network in people.teachers.items()}
    return {
        "data": data.fingerprint,
        "student": people.student.fingerprint,
        "tokenizer": tokenizer_digest(people.tokenizer),
        **teachers,
        **(text.digests if text else {}),
        **stores.identities(people, endpoints),
        **{SIGNALS + name: digest for name, digest in found.digests.items()},
    }
