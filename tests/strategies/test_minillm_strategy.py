"""MiniLLM as a whole: its terms as in the paper, on which rows they count, and the gradient that they add up to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from strategies.core import Progress, Term
from strategies.minillm import MiniLLM
from strategies.objectives.divergence import ForwardKL, ReverseKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.sampled import ReverseKLRewardToGo
from strategies.policy import ACTED
from strategies.sources import TakeDense, TakenActions, Taught
from strategies.stages.rollout import Rollout, RowsOf
from strategies.stages.score import Score
from tests.strategies.two_steps import TwoSteps

START = Progress(0, 10)
LONG = ReverseKLRewardToGo(clip=50.0, discount=0.95, later_only=True, length_normalised=True, importance_cap=2.0)


def terms(**settings: Any) -> dict[str, Term]:
    found = MiniLLM(**settings).build().updates[0].terms
    return {t.name: t for t in found if isinstance(t, Term)}


def test_the_terms_are_those_of_the_paper() -> None:
    found = {name: (t.objective, t.scale(START), t.signal) for name, t in terms().items()}
    assert found == {
        "single": (ReverseKL(), 1.0, "teacher"),
        "long": (LONG, 1.0, ACTED),
        "ce": (CrossEntropy(), 0.5, None),
        "kl": (ForwardKL(), 0.5, "teacher"),
    }


def test_half_of_the_rows_are_written_and_each_kind_has_its_terms() -> None:
    strategy = MiniLLM(teacher="big").build()
    rollout, score, *rows = strategy.stages
    assert isinstance(rollout, Rollout) and rollout.share(START) == 0.5
    assert isinstance(score, Score) and (score.signal, score.endpoint, score.request.kind) == ("big", "big", "topk")
    assert rows == [RowsOf("single", "written"), RowsOf("long", "written"), RowsOf("ce", "given"), RowsOf("kl", "given")]
    assert strategy.signals[ACTED] == TakenActions(teacher="big") and isinstance(strategy.signals["big"], Taught)


def test_a_loss_on_given_rows_that_weighs_nothing_is_left_out() -> None:
    assert list(terms(given_ce_weight=0, given_kl_weight=0.0)) == ["single", "long"]


@pytest.mark.parametrize("seed", range(4))
def test_its_terms_on_written_rows_add_up_to_the_gradient_of_whole_texts(seed: int) -> None:
    texts, found = TwoSteps.of(seed), terms(discount=1.0, take=TakeDense())
    _, want1, want2 = texts.divergence
    _, single1, single2 = texts.estimate(found["single"].objective, dense=True)
    _, long1, long2 = texts.estimate(found["long"].objective, acted=True)
    np.testing.assert_allclose(single1 + long1, want1, atol=4e-6)
    np.testing.assert_allclose(single2 + long2, want2, atol=4e-6)


@pytest.mark.parametrize("seed", range(4))
def test_texts_whose_first_token_staler_weights_wrote_are_weighed_back(seed: int) -> None:
    texts, found = TwoSteps.of(seed), terms(discount=1.0, take=TakeDense(), importance_cap=None)
    older = replace(texts, first=texts.first + np.asarray([0.5, 0, -0.5, 0], np.float32))
    capped = terms(discount=1.0, take=TakeDense(), importance_cap=9.0)
    _, want, _ = texts.estimate(found["long"].objective, acted=True)
    _, by, _ = texts.estimate(capped["long"].objective, acted=True, writer=older)
    np.testing.assert_allclose(by, want, atol=4e-6)
    _, bare, _ = texts.estimate(found["long"].objective, acted=True, writer=older)
    assert np.abs(bare - want).max() > 0.01


@pytest.mark.parametrize("settings", [{"sample_temperature": 0.7}, {"top_p": 0.9}, {"sample_top_k": 5}])
def test_rewards_hold_for_text_drawn_from_all_tokens_only(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected sample_temperature 1, top_p 1 and sample_top_k 0"):
        MiniLLM(**settings)


@pytest.mark.parametrize("take", ["hidden", "per-token", "sampled"])
def test_what_lacks_a_whole_distribution_or_single_tokens_is_refused(take: str) -> None:
    with pytest.raises(ValidationError, match="'topk', 'dense'"):
        MiniLLM.model_validate({"take": {"type": take}})
