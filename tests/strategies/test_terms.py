"""A loss written out in the recipe: what it builds, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from strategies.core import Columns, Progress, StatesTerm
from strategies.objectives import OBJECTIVES
from strategies.sources import Blended, Taught
from strategies.stages.score import Score
from strategies.stages.support import SharedSupport
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


def test_a_blend_of_top_k_answers_is_on_the_ids_of_all_of_them() -> None:
    signals = {
        "a": {"endpoint": "x"},
        "b": {"endpoint": "y", "take": {"type": "topk", "top_k": 2}},
        "both": {"blend": {"a": 0.5, "b": 0.5}},
    }
    strategy = build(signals=signals, terms=[{"objective": "forward-kl", "signal": "both"}])
    *scores, support = strategy.stages
    assert [type(s) for s in scores] == [Score, Score] and support == SharedSupport(("a", "b"), "both/")
    rows = {"a": ([5, 3], [0.6, 0.3]), "b": ([3, 7], [0.5, 0.4])}
    columns: Columns = {f"{m}/logprob": np.zeros(1, np.float32) for m in rows}
    for member, (ids, p) in rows.items():
        columns |= {f"{member}/ids": np.asarray(ids, np.int32), f"{member}/logprobs": np.log(np.asarray(p, np.float32))}
    laid = {n: torch.from_numpy(v.reshape(1, -1)) for n, v in support(columns, None).items()}
    members = {n: s.take.read({c: laid[f"{n}/{c}"] for c in s.take.columns}, None) for n, s in strategy.signals.items() if "/" in n}
    blend = strategy.signals["both"]
    assert blend.gives == {"pair", "expectation"}
    log_p = blend.of(members, {}).teacher(9, 1.0).exp()[0]
    found = dict(zip(laid["both/a/ids"][0].tolist(), log_p.tolist(), strict=False))
    assert found[3] == pytest.approx(0.4, rel=1e-5) and found[5] == pytest.approx(0.5 * 0.6 + 0.5 * 0.1 / 6, rel=1e-4)


def test_a_blend_gives_what_all_of_its_members_give() -> None:
    signals = {
        "a": {"endpoint": "x", "take": "dense"},
        "b": {"player": "y", "take": "hidden"},
        "both": {"blend": {"a": 2, "b": -1}, "kind": "product"},
    }
    strategy = build(signals=signals, terms=[{"objective": "forward-kl", "signal": "both"}])
    assert strategy.signals["both"].gives == {"pair", "expectation", "label"} and [type(s) for s in strategy.stages] == [Score]


def test_inner_states_are_compared_with_a_frozen_player() -> None:
    strategy = build(terms=[{"objective": "hidden-states", "signal": "guide"}])
    (term,) = strategy.updates[0].terms
    assert isinstance(term, StatesTerm) and term.signal == "guide" and not strategy.players["guide"].trained


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_can_be_named_in_a_recipe_and_has_a_doc(name: str) -> None:
    assert OBJECTIVES[name].model_fields["type"].default == name
    assert (OBJECTIVES[name].__doc__ or "").strip()


def blending(*takes: Any, weights: tuple[float, float] = (0.5, 0.5), where: str = "endpoint") -> dict[str, Any]:
    """A recipe whose one term reads a blend of two signals."""
    members: dict[str, Any] = {name: {where: name, "take": take} for name, take in zip("ab", takes, strict=True)}
    signals = members | {"both": {"blend": dict(zip("ab", weights, strict=True))}}
    return {"signals": signals, "terms": [{"objective": "forward-kl", "signal": "both"}]}


DROPPED = {"teacher": {"endpoint": "a", "take": {"type": "topk", "tail": "drop"}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"terms": []}, "at least 1"),
        ({"terms": [{"objective": "forward-k"}]}, "does not match any of the expected tags"),
        ({"terms": [{"objective": {"type": "jsd", "bta": 0.1}}]}, "Extra inputs"),
        ({"signals": {"t": {}}, "terms": [{"objective": "cross-entropy"}]}, "one of endpoint, player and blend"),
        ({"signals": {"t": {"endpoint": "a", "player": "b"}}, "terms": [{"objective": "cross-entropy"}]}, "one of endpoint"),
        ({"signals": {"t": {"blend": {"ghost": 1.0}}}, "terms": [{"objective": "cross-entropy"}]}, "ghost"),
        (blending("dense", "dense", weights=(1.5, -0.5)), "shares, none below 0"),
        (blending("dense", "dense", weights=(0.0, 0.0)), "shares, none below 0"),
        (blending("sampled", "sampled"), "whole distributions"),
        (blending("dense", "per-token"), "whole distributions"),
        (blending("topk", "hidden"), "all topk or all of dense and hidden"),
        (blending("topk", {"type": "topk", "tail": "renormalise"}), "tail: bucket"),
        (blending("topk", "topk", where="player"), "of endpoints"),
        ({"signals": DROPPED, "terms": [{"objective": "adakd-absolute"}]}, "tempered one by one"),
        ({"signals": DROPPED, "terms": [{"objective": {"type": "selected-tokens", "divergence": {"type": "adakd-absolute"}}}]}, "tempered"),
    ],
)
def test_a_mistake_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**content)
