"""What MiniLLM adds to reward-to-go: the single step split off, lengths, and texts that the student did not write alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from strategies.acted import Acted
from strategies.objectives.divergence import ReverseKL
from strategies.objectives.sampled import ReverseKLRewardToGo, mixed_importance, next_in_row
from tests.strategies import reference
from tests.strategies import reference_sampled as exact
from tests.strategies.chunking import Tokens, floats, given_tokens, run, same
from tests.strategies.two_steps import TwoSteps

SEEDS = range(4)
VOCABULARY, TOKENS = 7, 11


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32)


def case(seed: int) -> tuple[np.ndarray, Tokens, np.ndarray]:
    """Logits, interleaved rows with tokens of no weight, and d."""
    draw = np.random.default_rng(seed)
    z_q, labels = logits(seed + 7, TOKENS, VOCABULARY), draw.integers(0, VOCABULARY, TOKENS)
    log_p = (-draw.exponential(2, TOKENS)).astype(np.float32)
    weights = np.where(draw.random(TOKENS) < 0.3, 0.0, draw.uniform(0.5, 2, TOKENS)).astype(np.float32)
    tokens = Tokens(labels, given_tokens(log_p), weights, draw.integers(0, 3, TOKENS))
    return z_q, tokens, log_p - exact.label_logprobs(z_q, labels)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_single_step_in_closed_form_and_the_long_term_make_the_gradient_of_whole_sequences(seed: int) -> None:
    texts = TwoSteps.of(seed)
    _, want1, want2 = texts.divergence
    _, single1, single2 = texts.estimate(ReverseKL(), dense=True)
    _, long1, long2 = texts.estimate(ReverseKLRewardToGo(later_only=True))
    np.testing.assert_allclose(single1 + long1, want1, atol=4e-6)
    np.testing.assert_allclose(single2 + long2, want2, atol=4e-6)
    assert np.abs(long1).max() > 0.01 and not long2.any()


@pytest.mark.parametrize("chunk_tokens", [1, 4, TOKENS])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("later_only", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_long_term_by_its_formula_under_any_chunking(seed: int, later_only: bool, normalised: bool, chunk_tokens: int) -> None:
    z_q, tokens, d = case(seed)
    objective = ReverseKLRewardToGo(discount=0.9, clip=1.5, later_only=later_only, length_normalised=normalised)
    to_go = exact.long_term(np.clip(d, -1.5, 1.5), tokens.rows, tokens.weights != 0, 0.9, later_only, normalised)
    want = ((tokens.weights * -d).sum(), (-tokens.weights * to_go)[:, None] * exact.label_gradient(z_q, tokens.labels))
    same(run(objective, z_q, tokens, chunk_tokens), want)


def test_a_first_token_that_the_teacher_rules_out_harms_nobody_in_the_long_term() -> None:
    z_q, tokens, _ = case(0)
    log_p = np.where(np.arange(TOKENS) == 0, -np.inf, -1.0)
    first = replace(tokens, signal=given_tokens(log_p), weights=None, rows=np.zeros(TOKENS, dtype=np.int64))
    _, gradient = run(ReverseKLRewardToGo(later_only=True), z_q, first)
    assert np.isfinite(gradient).all() and gradient[:-1].any(-1).all() and not gradient[-1].any()


def test_the_next_token_is_that_of_the_same_row() -> None:
    values, rows = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([5, 2, 5, 2, 5])
    assert next_in_row(values, rows).tolist() == [3.0, 4.0, 5.0, 0.0, 0.0]
    assert next_in_row(values[:1], rows[:1]).tolist() == [0.0] and next_in_row(values[:0], rows[:0]).tolist() == []


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("seed", SEEDS)
def test_text_drawn_from_a_mixture_with_the_teacher_is_weighed_back_to_the_student_s(seed: int, share: float) -> None:
    z_q, z_p = logits(seed, VOCABULARY), logits(seed + 50, VOCABULARY)
    q, p, labels = reference.softmax(z_q), reference.softmax(z_p), np.arange(VOCABULARY)
    drawn = Tokens(labels, given_tokens(np.log(p)), (1 - share) * q + share * p, labels)
    value, gradient = run(ReverseKLRewardToGo(teacher_share=share), np.tile(z_q, (VOCABULARY, 1)), drawn)
    np.testing.assert_allclose(gradient.astype(np.float64).sum(0), exact.reverse_kl_gradient(z_q[None], z_p[None])[0], atol=3e-6)
    assert value == pytest.approx(float(reference.kl(q, p)), rel=1e-4)


def test_weights_of_a_mixture_are_q_over_it_and_bounded() -> None:
    q, p = np.asarray([0.3, 0.01, 0.5]), np.asarray([0.2, 0.9, 1e-30])
    found = mixed_importance(floats(np.log(p) - np.log(q)), 0.2).numpy()
    np.testing.assert_allclose(found, q / (0.8 * q + 0.2 * p), rtol=1e-5)
    assert mixed_importance(torch.tensor([torch.inf, -torch.inf]), 0.2).tolist() == [0.0, 1.25]


@pytest.mark.parametrize("seed", SEEDS)
def test_text_of_other_weights_is_weighed_by_its_own_ratio_up_to_the_cap(seed: int) -> None:
    z_q, tokens, d = case(seed)
    draw = np.random.default_rng(seed)
    log_q = exact.label_logprobs(z_q, tokens.labels)
    behaviour = (log_q + draw.normal(0, 1, TOKENS)).astype(np.float32)
    acts = Acted(torch.where(torch.from_numpy(tokens.weights) == 0, torch.nan, floats(behaviour)), tokens.signal.label_logprobs)
    ratio = np.minimum(np.exp(log_q - behaviour), 1.2)
    by = tokens.weights * ratio
    to_go = exact.long_term(d, tokens.rows, tokens.weights != 0, 1.0, False, False)
    want = ((by * -d).sum(), (-by * to_go)[:, None] * exact.label_gradient(z_q, tokens.labels))
    same(run(ReverseKLRewardToGo(importance_cap=1.2), z_q, replace(tokens, signal=acts)), want)
    assert (ratio == 1.2).any() and (ratio < 1.2).any()


def test_a_cap_needs_to_know_what_wrote_the_text() -> None:
    z_q, tokens, _ = case(0)
    with pytest.raises(ValueError, match="reverse-kl-reward-to-go cannot read the signal GivenTokens"):
        run(ReverseKLRewardToGo(importance_cap=2.0), z_q, tokens)


@pytest.mark.parametrize("settings", [{"teacher_share": 0.2}, {"temperature": 0.7}])
def test_two_corrections_of_one_text_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected importance_cap without teacher_share, at temperature 1"):
        ReverseKLRewardToGo(importance_cap=2.0, **settings)
