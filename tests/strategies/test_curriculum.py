"""Curricula as settings: DDK's mixture, missing skills, paces, and what listens to training."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from strategies.control import AdaptiveShare, begun, values_by_name
from strategies.core import Progress
from strategies.curriculum import (
    Curriculum,
    FixedMixture,
    GapMixture,
    Ordered,
    SkillMixture,
    ddk_start,
    ddk_update,
)
from strategies.paces import Competence, StalledShare

NOW = Progress(0, 10)


def reference(shares: list[float], ratios: list[float], alpha: float) -> np.ndarray:
    """DDK (arXiv:2407.16154) as its formula is written, in float64."""
    psi = np.asarray(shares) * np.exp(np.asarray(ratios))
    return np.asarray(alpha * psi / psi.sum() + (1 - alpha) / len(psi))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_ddk_is_its_formula(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    shares, ratios = rng.dirichlet(np.ones(4)).tolist(), rng.uniform(0.8, 10, 4).tolist()
    assert ddk_update(shares, ratios, alpha) == pytest.approx(reference(shares, ratios, alpha).tolist(), rel=1e-12)
    assert ddk_start(ratios) == pytest.approx((np.exp(ratios) / np.exp(ratios).sum()).tolist(), rel=1e-12)


def test_ddk_without_a_gap_to_tell_them_apart_is_even_and_nothing_falls_below_its_floor() -> None:
    assert ddk_update([0.7, 0.2, 0.1], [9.0, 1.0, 1.0], 0.0) == pytest.approx([1 / 3] * 3)
    shares = [0.7, 0.2, 0.1]
    for _ in range(200):
        shares = ddk_update(shares, [2.5] * 3, 0.9)
    assert shares == pytest.approx([1 / 3] * 3)
    for _ in range(50):
        shares = ddk_update(shares, [10.0, 1.0, 1.0], 0.5)
        assert min(shares) >= 0.5 / 3 and math.fsum(shares) == pytest.approx(1.0)
    assert shares[0] > 0.6


def losses(student: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    own = {f"eval/cross_entropy/{d}": v for d, v in student.items()}
    return own | {f"eval/teacher_cross_entropy/big/{d}": v for d, v in teacher.items()}


def test_the_mixture_moves_by_perplexities_whose_ratio_is_clipped() -> None:
    mixture = GapMixture(domains=("a", "b"), teacher="big", alpha=0.6)
    heard = losses({"a": 3.0, "b": 9.0}, {"a": 2.5, "b": 2.0})
    assert mixture.hears == set(heard)
    state = mixture.begin()
    assert mixture.value(state) == {"a": 0.5, "b": 0.5}
    state = mixture.after_evaluation(mixture.after_step(state, {}, NOW), heard)
    ratios = [math.exp(0.5), 10.0]
    assert state == pytest.approx(dict(zip("ab", np.exp(ratios) / np.exp(ratios).sum(), strict=True)))
    again = mixture.after_evaluation(state, heard)
    assert again == pytest.approx(dict(zip("ab", reference([state["a"], state["b"]], ratios, 0.6), strict=True)))
    assert mixture.value(again) == again


def test_missing_skills_are_drawn_by_their_share_of_failures() -> None:
    skills = SkillMixture(domains=("a", "b", "c"), alpha=0.6, smoothing=0.75)
    state = skills.begin()
    assert skills.value(state) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    state = skills.after_step(state, {"rollout/failed/a": 0.8}, NOW)
    assert skills.value(state) == pytest.approx({"a": 0.4 / 3 + 0.6, "b": 0.4 / 3, "c": 0.4 / 3})
    state = skills.after_step(state, {"rollout/failed/a": 0.0, "rollout/failed/b": 0.2, "rollout/failed/c": 0.0}, NOW)
    assert state == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.0})
    assert skills.value(state) == pytest.approx({"a": 0.4 / 3 + 0.45, "b": 0.4 / 3 + 0.15, "c": 0.4 / 3})
    nobody_fails = {f"rollout/failed/{d}": 0.0 for d in "abc"}
    assert SkillMixture(domains=("a", "b", "c")).after_step({}, nobody_fails, NOW) == dict.fromkeys("abc", 0.0)
    assert skills.value(dict.fromkeys("abc", 0.0)) == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_missing_skills_by_held_out_loss() -> None:
    skills = SkillMixture(domains=("a", "b"), by="loss", alpha=1.0)
    assert skills.hears == {"eval/cross_entropy/a", "eval/cross_entropy/b"}
    state = skills.after_evaluation(skills.after_step(skills.begin(), {"loss": 1.0}, NOW), losses({"a": 1.0, "b": 3.0}, {}))
    assert skills.value(state) == {"a": 0.25, "b": 0.75}


def test_competence_begins_and_ends_where_it_should_and_never_falls() -> None:
    pace = Competence(competence=0.1, over_steps=100)
    shares = [pace(Progress(step, 300)) for step in range(300)]
    assert shares[0] == pytest.approx(0.1) and shares[99] < 1.0 and shares[100:] == [1.0] * 200
    assert all(a <= b for a, b in pairwise(shares))
    assert shares[25] ** 2 == pytest.approx(0.25 * (1 - 0.01) + 0.01)
    assert Competence(competence=0.5)(Progress(20, 20)) == 1.0


def test_a_stalled_share_rises_only_when_the_loss_has_stopped_falling() -> None:
    pace = StalledShare(start=0.2, rise=0.3, patience=2, smoothing=0.0)
    state, shares = pace.begin(), []
    for loss in [5.0, 4.0, 3.0, 3.0, 3.1, 2.0, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5]:
        state = pace.after_step(state, {"loss": loss}, NOW)
        shares.append(pace.value(state))
    assert shares == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.8, 0.8, 1.0, 1.0, 1.0])
    assert pace.after_evaluation(state, {"eval/cross_entropy": 9.0}) == state


def test_a_stalled_share_may_listen_to_evaluations_and_smooths_what_it_hears() -> None:
    pace = StalledShare(start=0.5, rise=0.5, patience=1, metric="eval/cross_entropy", least_fall=0.1, smoothing=0.5)
    state = pace.after_evaluation(pace.begin(), {"eval/cross_entropy": 2.0})
    assert pace.after_step(state, {"loss": 9.0}, NOW) == state
    state = pace.after_evaluation(state, {"eval/cross_entropy": 1.6})
    assert (state["mean"], state["share"]) == (1.8, 0.5)
    assert pace.after_evaluation(state, {"eval/cross_entropy": 1.7})["share"] == 1.0


def test_fixed_shares_are_weights_of_a_sum() -> None:
    mixture = FixedMixture.model_validate({"shares": {"a": 3, "b": {"ramp": [1, 0], "over_steps": 10}}})
    assert mixture.at(Progress(0, 20)) == (0.75, 0.25) and mixture.at(Progress(10, 20)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="step 11"):
        FixedMixture.model_validate({"shares": {"a": {"ramp": [1, 0], "over_steps": 10}, "b": 0}}).at(Progress(10, 20))


def test_what_listens_is_told_by_name_and_a_control_listens_to_less() -> None:
    settings: dict[str, Any] = {"order": {"pace": {"patience": 3}}, "mixture": {"type": "ddk", "domains": ["a", "b"]}}
    curriculum = Curriculum.model_validate(settings)
    assert begun(curriculum.controllers()) == {"pace": 0.2, "mixture/a": 0.5, "mixture/b": 0.5}
    assert set(Curriculum.model_validate(settings | {"control": "random"}).controllers()) == {"pace"}
    assert Curriculum.model_validate({"order": {"pace": 0.5}}).controllers() == {}
    both = {"share": AdaptiveShare(start=0.3), "mixture": GapMixture(domains=("a", "b"))}
    assert values_by_name({"share": {"share": 0.3}, "mixture": {"a": 0.9, "b": 0.1}}, both) == {
        "share": 0.3,
        "mixture/a": 0.9,
        "mixture/b": 0.1,
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "order, mixture or both"),
        ({"order": {"pace": 0.0}}, "above 0"),
        ({"order": {"pace": {"ramp": [0.2, 1.2]}}}, "up to 1"),
        ({"order": {"pace": {"competence": 0.0}}}, "greater than 0"),
        ({"order": {"pace": {"patience": 0}}}, "greater than 0"),
        ({"order": {"pace": "fast"}}, "valid number"),
        ({"mixture": {"type": "ddk", "domains": ["a"]}}, "at least 2 items"),
        ({"mixture": {"type": "shares", "shares": {"a": 1, "b": -1}}}, "0 or more"),
        ({"mixture": {"type": "shares", "shares": {"a": 1}}}, "at least 2 items"),
        ({"order": {}, "control": "other"}, "'none' or 'random'"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Curriculum.model_validate(settings)


def test_the_shortest_settings_say_a_whole_curriculum() -> None:
    assert Curriculum.model_validate({"order": {"pace": {"ramp": [0.2, 1.0]}}}).order == Ordered.model_validate(
        {"pace": {"ramp": [0.2, 1.0]}}
    )
    assert isinstance(Curriculum.model_validate({"order": {"pace": {"patience": 5}}}).order.pace, StalledShare)  # type: ignore[union-attr]
