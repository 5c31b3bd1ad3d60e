"""The door, for strategies with a frozen player: what cannot be compared is refused, and what workers will hold is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

import strategies
from orchestrator.errors import Refusal
from orchestrator.plan_text import plan_text
from strategies.core import Player, StatesTerm, Strategy, StrategyConfig, Term, lm_update
from strategies.objectives.features import HiddenStates
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.relations import Relations
from strategies.schedule import constant
from tests.orchestrator.bench import Bench, edit, put, spoilt


class Toy(StrategyConfig):
    """Any objective on inner states, beside cross-entropy."""

    type: Literal["toy-states"] = "toy-states"
    objective: HiddenStates | Relations = HiddenStates()
    teacher: str = "teacher"
    signal: str = "guide"

    def build(self) -> Strategy:
        states = StatesTerm("states", self.objective, constant(1.0), self.signal)
        players = {"student": Player(), "guide": Player(model=self.teacher, trained=False)}
        return Strategy(players=players, updates=(lm_update(states, Term("ce", CrossEntropy(), constant(1.0))),))


@pytest.fixture
def toy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setitem(strategies.STRATEGIES, "toy-states", Toy)
    bench.recipe["strategy"] = {"type": "toy-states"}
    return bench


def test_a_plan_tells_who_is_frozen_and_what_it_holds(toy: Bench) -> None:
    plan = toy.plan()
    worker, *others = plan.memory
    assert [d.role for d in plan.demands] == ["worker", "reader"] and [m.role for m in others] == ["reader", "driver and Ray"]
    teacher = plan.cast.teachers["teacher"]
    assert worker.parts["frozen players"] > 4 * teacher.parameters
    assert worker.parts["filters"] == 16 * 32 * 48
    assert plan.fingerprints["endpoints.teacher"] == teacher.fingerprint
    text = " ".join(plan_text(plan).split())
    assert "teacher (frozen in every training worker)" in text and "states = 1 x HiddenStates of guide" in text
    assert plan.warnings == ()
    assert not plan.endpoints and list(plan.frozen) == ["teacher"]


def test_more_layers_are_held_and_trained(toy: Bench) -> None:
    one = toy.plan().memory[0].parts
    put("strategy.objective", {"type": "hidden-states", "layers": ["output", {"depth": 0.5}]})(toy)
    two = toy.plan().memory[0].parts
    assert two["filters"] == 2 * one["filters"] and two["frozen players"] > one["frozen players"]


def objective(**settings: Any) -> Callable[[Bench], None]:
    return put("strategy.objective", settings)


HIDDEN, RELATIONS = {"type": "hidden-states"}, {"type": "relations"}

MISTAKES: dict[str, tuple[Callable[[Bench], None], list[str]]] = {
    "layer": (objective(**HIDDEN, layers=[{"number": 3}]), ["term 'states'", "layer number 3: got a network of 2 layers", "one it has"]),
    "widths": (objective(**HIDDEN, filter="none"), ["hidden states of width 32 and 48", "equal widths, or filter: linear"]),
    "heads": (objective(**RELATIONS, heads=5), ["query at depth 1: got width 32", "a multiple of the 5 relation heads"]),
    "no attention": (objective(**RELATIONS, layer={"number": 0}, heads=4), ["query of layer 0", "separate projections"]),
    "unknown teacher": (put("strategy.teacher", "teachr"), ["the endpoint 'teachr', which nothing defines", "teacher"]),
    "unknown player": (put("strategy.signal", "teacher"), ["the signal 'teacher'", "one of its frozen players: guide"]),
    "fake": (put("endpoints.teacher", {"engine": "fake", "vocabulary": 512}), ["endpoints.teacher", "an engine without a network"]),
    "quantized": (put("endpoints.teacher.quantization", "int8"), ["endpoints.teacher.quantization", "without a GPU"]),
    "vocabulary": (lambda bench: put("endpoints.teacher.model", str(bench.folder / "foreign"))(bench), ["got 400 ids"]),
    "context": (spoilt("teacher", edit(max_position_embeddings=16)), ["data.max_length_tokens", "at most the 16"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_in_words(toy: Bench, name: str) -> None:
    spoil, words = MISTAKES[name]
    spoil(toy)
    with pytest.raises(Refusal) as refused:
        toy.plan()
    for word in words:
        assert word in str(refused.value)
