"""Held-out evaluation inside a training worker: rows scored once, kept, and read by every evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from orchestrator.collective import total
from orchestrator.layouts import Layout
from orchestrator.microbatch import MicroBatch, dummy
from strategies.core import Columns, Progress, Term
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.measures import measures
from strategies.schedule import constant


def evaluation_terms(signals: Sequence[str]) -> tuple[Term, ...]:
    """Sums measured on held-out tokens: cross-entropy, and for each teacher both KLs and agreements."""
    terms = [Term("cross_entropy", CrossEntropy(), constant(1.0))]
    for signal in signals:
        prefix = "" if len(signals) == 1 else f"{signal}/"
        terms += [Term(f"{prefix}{name}", measure, constant(1.0), signal) for name, measure in measures().items()]
    return tuple(terms)


def evaluate(layout: Layout, micros: Sequence[MicroBatch], terms: tuple[Term, ...], rounds: int, device: torch.device) -> dict[str, float]:
    """Means over all held-out tokens of all ranks, under `eval/`. Collective: every rank runs `rounds` forwards."""
    ones = {t.name: 1.0 for t in terms}
    sums = torch.zeros(len(terms) + 1, dtype=torch.float64)
    layout.module.eval()
    with torch.no_grad():
        for i in range(rounds):
            micro = micros[i] if i < len(micros) else dummy()
            with layout.micro(last=True):
                _, parts = layout.module(micro.to(device), terms, ones, Progress(0, 1))
            sums[:-1] += parts.double().cpu()
            sums[-1] += micro.loss_tokens
    layout.module.train()
    values = total(sums).tolist()
    means = {t.name: v / values[-1] for t, v in zip(terms, values, strict=False)}
    means["perplexity"] = math.exp(min(means["cross_entropy"], 700.0))
    return {f"eval/{name}": value for name, value in means.items()}


def teacher_cross_entropy(bundles: Sequence[Columns], signals: Sequence[str]) -> dict[str, float]:
    """Each teacher's own cross-entropy on the held-out tokens, from its stored log-probabilities. Collective."""
    found = {}
    for signal in signals:
        given = [b[f"{signal}/logprob"] for b in bundles]
        sums = torch.tensor([float(sum(-g.sum(dtype=np.float64) for g in given)), float(sum(len(g) for g in given))])
        value, tokens = total(sums.double()).tolist()
        found[f"eval/teacher_cross_entropy/{signal}"] = value / tokens
    return found
