"""Held-out evaluation inside a training worker: rows scored once, kept, and read by every evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator import held_out_store
from orchestrator.collective import gather, total, world_size
from orchestrator.layouts import Layout
from orchestrator.microbatch import WEIGHTS, MicroBatch, cut_bundle, dummy
from orchestrator.teachers import Teachers
from strategies.core import Columns, Progress, Term
from strategies.domains import DOMAIN, domain_id
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.measures import TeacherCrossEntropy, measures
from strategies.schedule import constant
from strategies.sources import Taught
from strategies.stages.align import NONE

if TYPE_CHECKING:
    from orchestrator.stream import Stream
    from orchestrator.worker import WorkerJob

TEACHER_CROSS_ENTROPY = "teacher_cross_entropy"
MOST_DOMAINS = 64
"""Domains whose losses are told apart; of more, none are."""


def evaluation_terms(measured: Mapping[str, Taught], domains: Sequence[str] = ()) -> tuple[Term, ...]:
    """Sums measured on held-out tokens: cross-entropy, and of each teacher whatever its signal gives. Names carry the
    teacher's endpoint when there are several. Cross-entropies are also measured on the tokens of each domain (`told_apart`)."""
    terms = [Term("cross_entropy", CrossEntropy(), constant(1.0))]
    terms += [Term(f"cross_entropy/{d}", CrossEntropy(), constant(1.0)) for d in _apart(domains)]
    for signal, source in measured.items():
        prefix = "" if len(measured) == 1 else f"{source.endpoint}/"
        terms += [Term(f"{prefix}{name}", m, constant(1.0), signal) for name, m in measures().items() if m.reads in source.gives]
        if "label" in source.gives:
            name = f"{TEACHER_CROSS_ENTROPY}/{source.endpoint}"
            terms += [Term(n, TeacherCrossEntropy(), constant(1.0), signal) for n in (name, *(f"{name}/{d}" for d in _apart(domains)))]
    return tuple(terms)


def domain_metrics(measured: Mapping[str, Taught], domains: Sequence[str]) -> list[str]:
    """Names of what evaluations find of each of these domains, where it has held-out rows."""
    who = ["cross_entropy", *(f"{TEACHER_CROSS_ENTROPY}/{source.endpoint}" for source in measured.values())]
    return [f"eval/{name}/{domain}" for name in who for domain in _apart(domains)]


def _apart(domains: Sequence[str]) -> Sequence[str]:
    return domains if len(domains) <= MOST_DOMAINS else ()


def told_apart(bundle: Columns, domains: Sequence[str], measured: Mapping[str, Taught]) -> Columns:
    """Held-out rows with the weights of the terms that are measured on one domain: 1 for its tokens, 0 for others."""
    weights: Columns = {}
    of_all = {t.name for t in evaluation_terms(measured)}
    for domain in _apart(domains):
        own = _of_domain(bundle, domain).astype(np.float32)
        weights |= {WEIGHTS + t.name: own for t in evaluation_terms(measured, [domain]) if t.name not in of_all}
    return {**bundle, **weights}


def _of_domain(bundle: Columns, domain: str) -> NDArray[np.bool_]:
    """Which loss tokens are of a domain, `(N,)`."""
    rows = bundle[DOMAIN] == domain_id(domain)
    return np.asarray(np.repeat(rows, bundle["lengths"].astype(np.int64))[bundle["loss_mask"].astype(bool)])


@dataclass(frozen=True)
class HeldOut:
    """This rank's held-out rows, cut once, and how many forwards every rank runs."""

    bundles: list[Columns]
    micros: list[MicroBatch]
    rounds: int


def held_out_rows(job: WorkerJob, stream: Stream, rank: int) -> HeldOut:
    """Takes scored held-out rows from the stream and keeps them, or reads those kept before. Collective."""
    arriving = dict(stream.held_out())
    if arriving:
        held_out_store.store_bundles(job.held_out, arriving)
        gather([0.0])  # every rank has stored its part
        if rank == 0:
            job.held_out.write(held_out_store.COMPLETE, b"")
    bundles = list(arriving.values()) or held_out_store.load_bundles(job.held_out, rank, world_size())
    micros = [m for b in bundles for m in cut_bundle(job.run, told_apart(b, job.domains, job.measured), job.measured)]
    return HeldOut(bundles, micros, int(gather([float(len(micros))]).max()))


def evaluate(
    layout: Layout, micros: Sequence[MicroBatch], terms: tuple[Term, ...], rounds: int, teachers: Teachers, device: torch.device
) -> dict[str, float]:
    """Means over all held-out tokens of all ranks that a term weighs, under `eval/`; of none, no mean. Collective: every rank runs
    `rounds` forwards."""
    ones = {t.name: 1.0 for t in terms}
    sums = torch.zeros(2, len(terms), dtype=torch.float64)  # of the terms, and of their tokens
    layout.module.eval()
    with torch.no_grad():
        for i in range(rounds):
            micro = teachers.teach((micros[i] if i < len(micros) else dummy()).to(device), terms)
            with layout.micro(last=True):
                _, parts, _ = layout.module(micro, terms, ones, Progress(0, 1))
            tokens = [float(micro.weights[t.name].sum()) if t.name in micro.weights else float(micro.loss_tokens) for t in terms]
            sums += torch.stack([parts.double().cpu(), torch.tensor(tokens, dtype=torch.float64)])
    layout.module.train()
    values, counts = total(sums).tolist()
    means = {t.name: v / n for t, v, n in zip(terms, values, counts, strict=True) if n}
    means["perplexity"] = math.exp(min(means["cross_entropy"], 700.0))
    return {f"eval/{name}": value for name, value in means.items()}


def teacher_cross_entropy(bundles: Sequence[Columns], measured: Mapping[str, Taught], domains: Sequence[str] = ()) -> dict[str, float]:
    """Own cross-entropy of teachers whose signals do not give it, from the log-probabilities kept beside them; also on each domain's
    tokens. Of a teacher with another tokenizer it is for each of the student's tokens that lie in aligned spans, of which alone it tells.
    Collective."""
    found = {}
    for signal, endpoint in ((name, s.endpoint) for name, s in measured.items() if "label" not in s.gives):
        for domain in (None, *_apart(domains)):
            given = [b[f"{signal}/logprob"][_answered(b, signal, domain)] for b in bundles]
            mine = [float(sum(-g.sum(dtype=np.float64) for g in given)), float(sum(len(g) for g in given))]
            value, tokens = total(torch.tensor(mine, dtype=torch.float64)).tolist()
            if tokens:
                found[f"eval/{TEACHER_CROSS_ENTROPY}/{endpoint}" + (f"/{domain}" if domain else "")] = value / tokens
    return found


def _answered(bundle: Columns, signal: str, domain: str | None) -> NDArray[np.bool_]:
    """Loss tokens `(N,)`, of one domain or of all, that a teacher's log-probabilities are about."""
    span = bundle.get(f"{signal}/span")
    inside = np.ones(len(bundle[f"{signal}/logprob"]), np.bool_) if span is None else np.asarray(span != NONE)
    return inside if domain is None else inside & _of_domain(bundle, domain)
