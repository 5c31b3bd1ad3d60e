"""What is logged of an optimizer step, over all ranks: what the stream brought and cost, and what each term contributed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from orchestrator.bundle import scalar
from orchestrator.collective import gather, world_size
from orchestrator.rollout_metrics import as_written, oldest_steps, rollout_metrics, rollout_sums
from orchestrator.versions import VERSION
from strategies.core import COUNT, Columns, Progress, Strategy, Update
from strategies.sources import ForeignStates, Taught
from strategies.stages.score import Score

FREE = np.zeros(1, dtype=np.float32)
"""What an answer without a price costs, and a teacher that is shown everything leaves out."""


def stream_metrics(
    bundles: Sequence[Columns], strategy: Strategy, began: float, waited_seconds: float, domains: Sequence[str] = ()
) -> dict[str, float]:
    """Tokens and seconds of a step over the bundles of all ranks. `stream_wait_seconds` is what teachers and reader made
    a rank wait; `row_id_sum` shows which rows the step had, `cost` what a teacher's answers were priced at, `left_out` how many
    rows that the student wrote could not be shown to one, `dropped_mass` the most that a token of one lost. What stages count
    (`strategies.core.COUNT`) is summed under its own name."""
    scored = _scored(strategy)
    teachers = sorted({endpoint for endpoint, _ in scored})

    def told(endpoint: str, column: str) -> list[float]:
        return [float(b.get(f"{name}/{column}", FREE)[0]) for b in bundles for e, name in scored if e == endpoint]

    worked, paid, unseen = ([sum(told(t, column)) for t in teachers] for column in ("seconds", "cost", "left_out"))
    lost = [max(told(t, "dropped_mass")) for t in teachers]
    written = [as_written(b) for b in bundles]
    texts = _added([rollout_sums(w, strategy.base, domains) for w in written])
    counts = _added([{n.removeprefix(COUNT): float(v[0]) for n, v in sorted(b.items()) if n.startswith(COUNT)} for b in bundles])
    first, largest = [*texts.values(), *counts.values()], [*lost, max(oldest_steps(w) for w in written)]
    read = [float(sum(len(b["tokens"]) for b in bundles)), float(sum(b["row_id"].sum() for b in bundles))]
    ranks = gather([*first, *read, waited_seconds, *worked, *paid, *unseen, *largest])
    tokens, row_ids, waited, *summed = ranks.sum(0).tolist()[len(first) :]
    *dropped, oldest = ranks[:, len(ranks[0]) - len(largest) :].amax(0).tolist()
    seconds = time.perf_counter() - began + waited_seconds
    bundle = bundles[0]
    age = float(scalar(bundle, "step") - 1 - scalar(bundle, VERSION)) if VERSION in bundle else 0.0
    timing = {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "rows": float(scalar(bundle, "rows_total")),
        "workers": float(world_size()),
        "row_id_sum": row_ids,
        "stream_wait_seconds": waited / world_size(),
        "step_seconds": seconds,
        "age_steps": age,
    }
    sums = ranks.sum(0).tolist()[: len(first)]
    timing |= rollout_metrics(dict(zip(texts, sums, strict=False)), oldest) | dict(zip(counts, sums[len(texts) :], strict=True))
    timing |= {f"score_seconds/{t}": s for t, s in zip(teachers, summed, strict=False)}
    timing |= {f"cost/{t}": c for t, c in zip(teachers, summed[len(teachers) :], strict=False) if c}
    timing |= {f"left_out/{t}": n for t, n in zip(teachers, summed[2 * len(teachers) :], strict=False) if n}
    return timing | {f"dropped_mass/{t}": d for t, d in zip(teachers, dropped, strict=True) if d}


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums of the bundles' own sums; of the same names in each."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _scored(strategy: Strategy) -> Sequence[tuple[str, str]]:
    """Who answers for which signal, those that are measured only among them."""
    taught = {(s.endpoint, name) for name, s in strategy.signals.items() if isinstance(s, Taught | ForeignStates) and s.endpoint}
    return sorted(taught | {(s.endpoint, s.signal) for s in strategy.stages if isinstance(s, Score)})


def loss_metrics(update: Update, sums: Iterable[float], counts: Mapping[str, float], progress: Progress) -> dict[str, float]:
    """Mean of each term, its weight, and its share of the absolute weighted loss."""
    means = {t.name: s / max(1.0, counts[t.name]) for t, s in zip(update.terms, sums, strict=True)}
    weighted = {t.name: t.scale(progress) * means[t.name] for t in update.terms}
    size = sum(abs(v) for v in weighted.values()) or 1.0
    metrics = {"loss": sum(weighted.values())}
    for term in update.terms:
        metrics[f"loss/{term.name}"] = means[term.name]
        metrics[f"weight/{term.name}"] = term.scale(progress)
        metrics[f"share/{term.name}"] = abs(weighted[term.name]) / size
    return metrics


def gradient_shares(update: Update, squares: Iterable[float]) -> dict[str, float]:
    """Share of each term in the sum of their pulls, as measured on a few tokens of every micro-batch (`strategies.pulls`)."""
    norms = {t.name: square**0.5 for t, square in zip(update.terms, squares, strict=True)}
    if len(norms) == 1:
        return {f"gradient_share/{name}": 1.0 for name in norms}
    size = sum(norms.values())
    return {f"gradient_share/{name}": norm / size if size else 0.0 for name, norm in norms.items()}
