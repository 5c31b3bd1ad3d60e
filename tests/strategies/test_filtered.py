"""Filters that learn to predict the tokens, and the distance between what they keep, against float64 references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.core import Progress, StatesTerm
from strategies.features import InnerStates, Ted
from strategies.head import Head
from strategies.objectives.filtered import FilteredLayers, FilterTask
from strategies.taps import OUTPUT, Filter, Layer, Tap, Tapped
from tests.strategies import reference_features as reference

NOW = Progress(0, 10)
NARROW, WIDE, VOCABULARY, TOKENS = 6, 9, 17, 5
LAYERS = (Layer(depth=0.5), Layer(depth=1.0))
TAPS = [Tap("hidden", layer) for layer in LAYERS]
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
KINDS = {"filter-task": FilterTask, "filtered-layers": FilteredLayers}


def sides(seed: int = 0) -> tuple[Tapped, Tapped]:
    draw = torch.Generator().manual_seed(seed)

    def outputs(width: int) -> dict[Tap, Tensor]:
        return {tap: torch.randn(1, TOKENS, width, generator=draw).requires_grad_() for tap in (*TAPS, OUTPUT)}

    index, rows = torch.arange(TOKENS), torch.zeros(1, TOKENS, dtype=torch.int64)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    head = Head(torch.randn(VOCABULARY, WIDE, generator=draw))
    return Tapped(outputs(NARROW), index, rows, labels), Tapped(outputs(WIDE), index, rows, labels, head)


def filters_of(objective: Any) -> Mapping[str, Filter]:
    torch.manual_seed(0)
    widths = [dict.fromkeys((*TAPS, OUTPUT), width) for width in (NARROW, WIDE)]
    made: Mapping[str, Filter] = objective.filters(*widths)
    return made


def double(values: Tensor) -> np.ndarray:
    return values.detach().double().numpy()


def by_formula(name: str, bend: Any, mine: Tapped, theirs: Tapped, filters: Mapping[str, Filter]) -> float:
    weights, total = double(WEIGHTS), 0.0
    for i, tap in enumerate(TAPS):
        kept = [bend(double(t.outputs[tap][0])) @ double(filters[f"{s}{i}"].weight).T for s, t in (("student", mine), ("teacher", theirs))]
        if name == "filtered-layers":
            total += float(weights @ reference.mse(*kept)) / len(TAPS)
            continue
        assert theirs.head is not None and theirs.labels is not None
        for states in kept:
            logits = states @ double(theirs.head.weight).T
            log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= float(weights @ log_q[np.arange(TOKENS), theirs.labels.numpy()]) / len(TAPS)
    return total


@pytest.mark.parametrize("kind", ["linear", "gelu-linear"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_sum_is_that_of_the_formula(name: str, kind: Any, seed: int) -> None:
    objective = KINDS[name](layers=LAYERS, filter=kind)
    mine, theirs = sides(seed)
    filters = filters_of(objective)
    value = objective.compare(mine, theirs, filters, WEIGHTS, NOW)
    bend = (lambda x: torch.nn.functional.gelu(torch.tensor(x)).numpy()) if kind == "gelu-linear" else (lambda x: x)
    assert value.item() == pytest.approx(by_formula(name, bend, mine, theirs, filters), rel=1e-5)


def test_only_filters_learn_from_the_task() -> None:
    objective = FilterTask(layers=LAYERS)
    mine, theirs = sides()
    filters = filters_of(objective)
    objective.compare(mine, theirs, filters, WEIGHTS, NOW).backward()
    assert all(f.weight.grad is not None and f.weight.grad.any() for f in filters.values())
    assert all(o.grad is None for side in (mine, theirs) for o in side.outputs.values())
    weight = filters["student0"].weight

    def at(values: np.ndarray) -> float:
        with torch.no_grad():
            weight.copy_(torch.tensor(values))
        return by_formula("filter-task", lambda x: x, mine, theirs, filters)

    found = double(weight.grad) if weight.grad is not None else None
    np.testing.assert_allclose(found, reference.slope(at, double(weight), step=1e-2), rtol=2e-2, atol=2e-3)


def test_the_student_and_its_filters_learn_from_the_teachers_filters() -> None:
    objective = FilteredLayers(layers=LAYERS)
    mine, theirs = sides()
    filters = filters_of(objective)
    objective.compare(mine, theirs, filters, WEIGHTS, NOW).backward()
    assert {n for n, f in filters.items() if f.weight.grad is not None} == {"student0", "student1"}
    assert all(mine.outputs[t].grad is not None for t in TAPS)
    assert all(o.grad is None for o in theirs.outputs.values())


def test_equal_networks_with_equal_filters_are_at_distance_zero() -> None:
    objective = FilteredLayers(layers=LAYERS)
    _, theirs = sides()
    filters = objective.filters(*[dict.fromkeys((*TAPS, OUTPUT), WIDE)] * 2)
    value = objective.compare(theirs, theirs, filters, WEIGHTS, NOW)
    value.backward()
    assert value.item() == 0.0 and not any(theirs.outputs[t].grad.any() for t in TAPS)  # type: ignore[union-attr]


def test_no_tokens_give_zero_and_no_head_is_named() -> None:
    mine, theirs = sides()
    none = [Tapped(t.outputs, t.index[:0], t.rows, t.labels[:0], t.head) for t in (mine, theirs)]  # type: ignore[index]
    for kind in KINDS.values():
        objective = kind(layers=LAYERS)
        assert objective.compare(none[0], none[1], filters_of(objective), WEIGHTS[:0], NOW).item() == 0.0
    with pytest.raises(ValueError, match="a frozen player's head"):
        FilterTask(layers=LAYERS).compare(mine, mine, filters_of(FilterTask(layers=LAYERS)), WEIGHTS, NOW)


def scales(strategy: Any, step: int) -> dict[str, float]:
    return {t.name: t.scale(Progress(step, 100)) for t in strategy.updates[0].terms}


def test_filters_are_taught_first() -> None:
    strategy = Ted(filter_steps=10, layers_weight=20.0).build()
    assert scales(strategy, 9) == {"filters": 1.0, "layers": 0.0, "kd": 0.0, "ce": 0.0}
    assert scales(strategy, 10) == {"filters": 0.0, "layers": 20.0, "kd": 1.0, "ce": 1.0}
    shared = {t.filters_name for t in strategy.updates[0].terms if isinstance(t, StatesTerm)}
    assert shared == {"layers"} and list(strategy.signals) == ["teacher"]


def test_without_its_terms_only_the_forward_kl_is_left() -> None:
    strategy = Ted(filter_steps=1, layers_weight=0.0, ce_weight=0.0).build()
    assert {n for n, s in scales(strategy, 1).items() if s} == {"kd"}


def test_a_scorer_is_asked_for_logits_alone() -> None:
    with_kl, without = InnerStates().build(), InnerStates(kd_weight=0.0).build()
    assert [type(s).__name__ for s in with_kl.stages] == ["Score"] and list(with_kl.signals) == ["teacher"]
    assert not without.stages and not without.signals and not without.players["guide"].trained
    assert Ted(filter_steps=3, kd_weight=0.0).build().stages == ()
