"""Held-out evaluation inside a training worker: rows scored once, kept, and read by every evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from orchestrator.collective import total
from orchestrator.layouts import Layout
from orchestrator.microbatch import MicroBatch, dummy
from orchestrator.teachers import Teachers
from strategies.core import Columns, Progress, Term
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.measures import TeacherCrossEntropy, measures
from strategies.schedule import constant
from strategies.sources import Taught

TEACHER_CROSS_ENTROPY = "teacher_cross_entropy"


def evaluation_terms(measured: Mapping[str, Taught]) -> tuple[Term, ...]:
    """Sums measured on held-out tokens: cross-entropy, and of each teacher whatever its signal gives. Names carry the
    teacher's endpoint when there are several."""
    terms = [Term("cross_entropy", CrossEntropy(), constant(1.0))]
    for signal, source in measured.items():
        prefix = "" if len(measured) == 1 else f"{source.endpoint}/"
        terms += [Term(f"{prefix}{name}", m, constant(1.0), signal) for name, m in measures().items() if m.reads in source.gives]
        if "label" in source.gives:
            terms.append(Term(f"{TEACHER_CROSS_ENTROPY}/{source.endpoint}", TeacherCrossEntropy(), constant(1.0), signal))
    return tuple(terms)


def evaluate(
    layout: Layout, micros: Sequence[MicroBatch], terms: tuple[Term, ...], rounds: int, teachers: Teachers, device: torch.device
) -> dict[str, float]:
    """Means over all held-out tokens of all ranks, under `eval/`. Collective: every rank runs `rounds` forwards."""
    ones = {t.name: 1.0 for t in terms}
    sums = torch.zeros(len(terms) + 1, dtype=torch.float64)
    layout.module.eval()
    with torch.no_grad():
        for i in range(rounds):
            micro = teachers.teach((micros[i] if i < len(micros) else dummy()).to(device), terms)
            with layout.micro(last=True):
                _, parts, _ = layout.module(micro, terms, ones, Progress(0, 1))
            sums[:-1] += parts.double().cpu()
            sums[-1] += micro.loss_tokens
    layout.module.train()
    values = total(sums).tolist()
    means = {t.name: v / values[-1] for t, v in zip(terms, values, strict=False)}
    means["perplexity"] = math.exp(min(means["cross_entropy"], 700.0))
    return {f"eval/{name}": value for name, value in means.items()}


def teacher_cross_entropy(bundles: Sequence[Columns], measured: Mapping[str, Taught]) -> dict[str, float]:
    """Own cross-entropy of teachers whose signals do not give it, from the log-probabilities kept beside them. Collective."""
    found = {}
    for signal, endpoint in ((name, s.endpoint) for name, s in measured.items() if "label" not in s.gives):
        given = [b[f"{signal}/logprob"] for b in bundles]
        sums = torch.tensor([float(sum(-g.sum(dtype=np.float64) for g in given)), float(sum(len(g) for g in given))])
        value, tokens = total(sums.double()).tolist()
        found[f"eval/{TEACHER_CROSS_ENTROPY}/{endpoint}"] = value / tokens
    return found
