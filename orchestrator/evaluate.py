"""Held-out evaluation inside a training worker: rows scored once, kept, and read by every evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from cluster.storage import Folder
from orchestrator.bundle import from_table, to_table
from orchestrator.collective import total
from orchestrator.layouts import Layout
from orchestrator.microbatch import MicroBatch, dummy
from strategies.core import Columns, Progress, Term
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.measures import measures
from strategies.schedule import constant

COMPLETE = "complete"


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


def store_bundles(folder: Folder, bundles: Mapping[int, Columns]) -> None:
    """Keeps this rank's scored held-out bundles by number."""
    for number, columns in bundles.items():
        sink = pa.BufferOutputStream()
        table = to_table(columns)
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        folder.write(f"{number:06d}.arrow", sink.getvalue().to_pybytes())


def load_bundles(folder: Folder, rank: int, world: int) -> list[Columns]:
    """The stored bundles that fall to this rank of `world`."""
    names = [n for n in folder.names() if n.endswith(".arrow")]
    contents = (folder.read(n) for n in names[rank::world])
    return [from_table(pa.ipc.open_file(pa.BufferReader(c)).read_all()) for c in contents if c is not None]


def signals_in(bundles: Sequence[Columns]) -> tuple[str, ...]:
    """Teachers whose scores the bundles carry."""
    return tuple(sorted({name.removesuffix("/logprobs") for b in bundles for name in b if name.endswith("/logprobs")}))
