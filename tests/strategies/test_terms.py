"""A loss written out in the recipe: what it builds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from strategies.core import Progress, StatesTerm
from strategies.objectives import OBJECTIVES
from strategies.sources import Blended, Taught
from strategies.terms import Terms


def build(**content: Any) -> Any:
    return Terms.model_validate({"type": "terms", **content}).build()


def test_a_term_that_reads_takes_the_only_signal_and_one_that_does_not_takes_none() -> None:
    strategy = build(terms=[{"objective": "forward-kl"}, {"objective": "cross-entropy", "weight": {"ramp": [1, 0], "over_steps": 10}}])
    kd, ce = strategy.updates[0].terms
    assert (kd.name, kd.signal, ce.name, ce.signal) == ("forward-kl", "teacher", "cross-entropy", None)
    assert (ce.scale(Progress(5, 10)), kd.scale(Progress(5, 10))) == (0.5, 1.0)
    assert [(s.signal, s.endpoint, s.request.kind) for s in strategy.stages] == [("teacher", "teacher", "topk")]


def test_stages_of_one_endpoint_stand_together_and_signals_nobody_reads_are_not_scored() -> None:
    signals = {
        "a": {"endpoint": "x", "take": "hidden"},
        "b": {"endpoint": "y", "take": {"type": "topk", "top_k": 3}},
        "c": {"endpoint": "x", "take": {"type": "sampled", "draws": 4, "exponent": 0.8}},
        "unread": {"endpoint": "z"},
        "near": {"player": "guide", "take": "dense"},
        "both": {"blend": {"a": 0.5, "near": 0.5}, "kind": "product"},
    }
    names = ("b", "c", "both")
    strategy = build(signals=signals, terms=[{"name": s, "objective": "forward-kl", "signal": s} for s in names])
    assert [(s.signal, s.endpoint) for s in strategy.stages] == [("a", "x"), ("c", "x"), ("b", "y")]
    assert set(strategy.signals) == {"a", "b", "c", "near", "both"}
    assert strategy.players["guide"].model == "guide" and not strategy.players["guide"].trained
    assert isinstance(strategy.signals["both"], Blended)
    assert isinstance(strategy.signals["c"], Taught) and strategy.signals["c"].take.request.exponent == 0.8


def test_inner_states_are_compared_with_a_frozen_player() -> None:
    strategy = build(terms=[{"objective": "hidden-states", "signal": "guide"}])
    (term,) = strategy.updates[0].terms
    assert isinstance(term, StatesTerm) and term.signal == "guide" and not strategy.players["guide"].trained


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_can_be_named_in_a_recipe_and_has_a_doc(name: str) -> None:
    assert OBJECTIVES[name].model_fields["type"].default == name
    assert (OBJECTIVES[name].__doc__ or "").strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"terms": []}, "at least 1"),
        ({"terms": [{"objective": "forward-k"}]}, "does not match any of the expected tags"),
        ({"terms": [{"objective": {"type": "jsd", "bta": 0.1}}]}, "Extra inputs"),
        ({"signals": {"t": {}}, "terms": [{"objective": "cross-entropy"}]}, "one of endpoint, player and blend"),
        ({"signals": {"t": {"endpoint": "a", "player": "b"}}, "terms": [{"objective": "cross-entropy"}]}, "one of endpoint"),
        ({"signals": {"t": {"blend": {"ghost": 1.0}}}, "terms": [{"objective": "cross-entropy"}]}, "ghost"),
    ],
)
def test_a_mistake_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**content)
