"""Sampled-token estimators: by enumeration of the vocabulary their expected gradients are what their names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from strategies.core import Progress, TwoPass
from strategies.head import TokenLogits
from strategies.objectives.parts import token_rows
from strategies.objectives.sampled import (
    ForwardKLK3,
    RefusedK1,
    ReverseKLPolicyGradient,
    ReverseKLRewardToGo,
    ReverseKLSquared,
    clipped_surrogate,
    k1,
    k2,
    k3,
    reward_to_go,
)
from strategies.schedule import Ramp
from tests.strategies import reference
from tests.strategies import reference_sampled as exact
from tests.strategies.chunking import Tokens, floats, given_tokens, run, same
from tests.strategies.two_steps import TwoSteps

SEEDS = range(4)
VOCABULARY = 7
SINGLE = [ReverseKLPolicyGradient, ReverseKLSquared, ForwardKLK3]
EVERY = [*SINGLE, ReverseKLRewardToGo]


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32)


def every_token(objective: Any, z_q: np.ndarray, z_p: np.ndarray, temperature: float = 1.0) -> tuple[float, np.ndarray]:
    """Expected value and gradient `(V,)` over y ~ q_T: one token for each y, weighed by its probability."""
    labels = np.arange(VOCABULARY)
    z = np.tile(z_q, (VOCABULARY, 1))
    signal = given_tokens(exact.label_logprobs(np.tile(z_p, (VOCABULARY, 1)), labels, temperature))
    tokens = Tokens(labels, signal, reference.softmax(z_q, temperature), rows=labels)
    value, gradient = run(objective, z, tokens)
    return value, gradient.astype(np.float64).sum(0)


@pytest.mark.parametrize("objective", [ReverseKLPolicyGradient(), ReverseKLSquared(), ReverseKLRewardToGo()])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_called_reverse_has_the_reverse_gradient_in_expectation(seed: int, objective: Any) -> None:
    z_q, z_p = logits(seed, VOCABULARY), logits(seed + 50, VOCABULARY)
    _, gradient = every_token(objective, z_q, z_p)
    np.testing.assert_allclose(gradient, exact.reverse_kl_gradient(z_q[None], z_p[None])[0], atol=2e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_k3_backpropagated_has_the_forward_gradient_in_expectation(seed: int) -> None:
    z_q, z_p = logits(seed, VOCABULARY), logits(seed + 50, VOCABULARY)
    _, gradient = every_token(ForwardKLK3(), z_q, z_p)
    np.testing.assert_allclose(gradient, reference.softmax(z_q) - reference.softmax(z_p), atol=2e-6)
    assert np.abs(gradient - exact.reverse_kl_gradient(z_q[None], z_p[None])[0]).max() > 0.01


@pytest.mark.parametrize("objective", [ReverseKLPolicyGradient, ReverseKLSquared])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_both_log_probabilities_are_those_of_the_temperature_that_wrote_the_token(objective: Any, temperature: float) -> None:
    z_q, z_p = logits(0, VOCABULARY), logits(50, VOCABULARY)
    value, gradient = every_token(objective(temperature=temperature), z_q, z_p, temperature)
    want = exact.reverse_kl_gradient(z_q[None] / temperature, z_p[None] / temperature)[0] / temperature
    np.testing.assert_allclose(gradient, want, atol=2e-6)
    if objective is ReverseKLPolicyGradient:
        q, p = reference.softmax(z_q, temperature), reference.softmax(z_p, temperature)
        assert value == pytest.approx(reference.kl(q, p), rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_and_k3_are_unbiased_values_of_the_reverse_kl_and_k3_is_never_negative(seed: int) -> None:
    z_q, z_p = logits(seed, VOCABULARY), logits(seed + 50, VOCABULARY)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    d, want = floats(np.log(p) - np.log(q)).double(), reference.kl(q, p)
    weights = torch.from_numpy(q)
    assert (weights * k1(d)).sum().item() == pytest.approx(want, rel=1e-6)
    assert (weights * k3(d)).sum().item() == pytest.approx(want, rel=1e-6)
    assert (k3(d) >= 0).all() and (k2(d) >= 0).all() and (k1(d) < 0).any()
    for objective in (ReverseKLPolicyGradient(), ForwardKLK3(), ReverseKLRewardToGo()):
        assert every_token(objective, z_q, z_p)[0] == pytest.approx(want, rel=1e-4)


def test_k1_backpropagated_would_have_no_gradient_and_is_refused_by_name() -> None:
    z = torch.from_numpy(logits(0, VOCABULARY)).double().requires_grad_()
    log_q, log_p = z.log_softmax(-1), torch.from_numpy(logits(50, VOCABULARY)).double().log_softmax(-1)
    (gradient,) = torch.autograd.grad((log_q.detach().exp() * k1(log_p - log_q)).sum(), z)
    assert gradient.abs().max() < 1e-12
    with pytest.raises(ValidationError, match="averages to 0 .* reverse-kl-policy-gradient"):
        RefusedK1()
    with pytest.raises(ValidationError, match="teaches nothing"):
        RefusedK1.model_validate({"type": "reverse-kl-k1"})


@pytest.mark.parametrize("objective", [ReverseKLPolicyGradient(), ForwardKLK3()])
def test_samples_agree_with_the_expectation_within_their_error(objective: Any) -> None:
    draw, count = np.random.default_rng(0), 40_000
    z_q, z_p = 0.7 * logits(0, VOCABULARY), 0.7 * logits(50, VOCABULARY)
    labels = draw.choice(VOCABULARY, size=count, p=reference.softmax(z_q))
    signal = given_tokens(np.log(reference.softmax(z_p))[labels])
    value, gradient = run(objective, np.tile(z_q, (count, 1)), Tokens(labels, signal), chunk_tokens=4096)
    want_value, want = every_token(objective, z_q, z_p)
    error = gradient.std(0) / np.sqrt(count)
    assert (np.abs(gradient.mean(0) - want) < 5 * error).all()
    assert value / count == pytest.approx(want_value, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_token_by_its_formula(seed: int) -> None:
    draw, tokens = np.random.default_rng(seed), 6
    z_q, labels = logits(seed, tokens, VOCABULARY), draw.integers(0, VOCABULARY, tokens)
    log_p, weights = -draw.exponential(2, tokens), draw.random(tokens).astype(np.float32)
    d = log_p.astype(np.float32) - exact.label_logprobs(z_q, labels)
    by_log_q, given = exact.label_gradient(z_q, labels), Tokens(labels, given_tokens(log_p), weights)
    cases: list[tuple[Any, np.ndarray, np.ndarray]] = [
        (ReverseKLPolicyGradient(), -d, -d),
        (ReverseKLPolicyGradient(clip=0.5), -d, -np.clip(d, -0.5, 0.5)),
        (ReverseKLSquared(), d**2 / 2, -d),
        (ReverseKLSquared(clip=0.5), np.clip(d, -0.5, 0.5) ** 2 / 2, -np.clip(d, -0.5, 0.5)),
        (ForwardKLK3(), np.exp(d) - 1 - d, 1 - np.exp(d)),
    ]
    for objective, value, slope in cases:
        same(run(objective, z_q, given), ((weights * value).sum(), (weights * slope)[:, None] * by_log_q))


@pytest.mark.parametrize("objective", [ReverseKLSquared(), ForwardKLK3()])
def test_what_is_backpropagated_is_what_autograd_makes_of_its_value(objective: Any) -> None:
    z_q, labels = logits(3, 5, VOCABULARY), np.asarray([0, 2, 4, 6, 1])
    log_p = np.log(reference.softmax(logits(9, 5, VOCABULARY)))[np.arange(5), labels].astype(np.float32)
    z = torch.from_numpy(z_q).double().requires_grad_()
    d = torch.from_numpy(log_p).double() - z.log_softmax(-1)[torch.arange(5), torch.from_numpy(labels)]
    value = (k2(d) if isinstance(objective, ReverseKLSquared) else k3(d)).sum()
    (gradient,) = torch.autograd.grad(value, z)
    same(run(objective, z_q, Tokens(labels, given_tokens(log_p))), (value.item(), gradient.numpy()))


@pytest.mark.parametrize("seed", SEEDS)
def test_reward_to_go_over_whole_sequences_has_the_gradient_of_their_divergence(seed: int) -> None:
    """The token horizon misses the long term."""
    texts = TwoSteps.of(seed)
    whole, want1, want2 = texts.divergence
    value, by1, by2 = texts.estimate(ReverseKLRewardToGo())
    np.testing.assert_allclose(by1, want1, atol=3e-6)
    np.testing.assert_allclose(by2, want2, atol=3e-6)
    assert value == pytest.approx(whole, rel=1e-4)
    value, by1, by2 = texts.estimate(ReverseKLPolicyGradient())
    single = exact.reverse_kl_gradient(texts.first[None], texts.teacher_first[None])[0]
    np.testing.assert_allclose(by1, single, atol=3e-6)
    np.testing.assert_allclose(by2, want2, atol=3e-6)
    assert np.abs(want1 - single).max() > 0.01 and value == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_scan_is_the_sum_over_later_tokens_of_the_row(seed: int, discount: float) -> None:
    draw = np.random.default_rng(seed)
    for count in (0, 1, 2, 5, 17, 64):
        rewards, rows = draw.normal(0, 1, count), draw.integers(0, 3, count)
        got = reward_to_go(torch.from_numpy(rewards), torch.from_numpy(rows), discount)
        np.testing.assert_allclose(got.numpy(), exact.to_go(rewards, rows, discount), atol=1e-12)


def long_case(seed: int, tokens: int = 9) -> tuple[np.ndarray, Tokens, np.ndarray]:
    draw = np.random.default_rng(seed)
    z_q, labels = logits(seed, tokens, VOCABULARY), draw.integers(0, VOCABULARY, tokens)
    log_p = (-draw.exponential(2, tokens)).astype(np.float32)
    weights = np.where(draw.random(tokens) < 0.3, 0.0, draw.random(tokens)).astype(np.float32)
    rows = np.sort(draw.integers(0, 3, tokens))
    return z_q, Tokens(labels, given_tokens(log_p), weights, rows), log_p - exact.label_logprobs(z_q, labels)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 9])
@pytest.mark.parametrize("seed", SEEDS)
def test_reward_to_go_by_its_formula_under_any_chunking(seed: int, chunk_tokens: int) -> None:
    z_q, tokens, d = long_case(seed)
    objective = ReverseKLRewardToGo(discount=0.9, clip=1.5)
    earned = np.where(tokens.weights != 0, np.clip(d, -1.5, 1.5), 0.0)
    slope = -tokens.weights * exact.to_go(earned, tokens.rows, 0.9)
    want = ((tokens.weights * -d).sum(), slope[:, None] * exact.label_gradient(z_q, tokens.labels))
    same(run(objective, z_q, tokens, chunk_tokens), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_discounted_future_is_the_token_horizon(seed: int) -> None:
    z_q, tokens, _ = long_case(seed)
    same(run(ReverseKLRewardToGo(discount=0.0), z_q, tokens), run(ReverseKLPolicyGradient(), z_q, tokens))


@pytest.mark.parametrize("objective", EVERY)
def test_a_student_equal_to_its_teacher_has_no_value_and_no_gradient(objective: Any) -> None:
    z_q, tokens, _ = long_case(0)
    log_q = TokenLogits(floats(z_q), torch.as_tensor(tokens.labels)).label_logprobs()
    value, gradient = run(objective(), z_q, Tokens(tokens.labels, given_tokens(log_q.numpy()), rows=tokens.rows))
    assert abs(value) < 1e-5
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


@pytest.mark.parametrize("objective", EVERY)
def test_a_token_of_no_weight_teaches_nothing_even_where_the_teacher_rules_it_out(objective: Any) -> None:
    z_q, tokens, _ = long_case(0)
    weights = np.asarray([1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=np.float32)
    log_p = np.where(weights == 0, -np.inf, -1.0)
    value, gradient = run(objective(), z_q, Tokens(tokens.labels, given_tokens(log_p), weights, tokens.rows))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not gradient[weights == 0].any() and gradient[weights != 0].any(-1).all()


@pytest.mark.parametrize("objective", EVERY)
def test_a_limit_keeps_a_ruled_out_token_finite_and_pushes_it_down(objective: Any) -> None:
    z_q = logits(0, 1, VOCABULARY)
    for log_p in (-np.inf, -1e4):
        _, gradient = run(objective(clip=5.0), z_q, Tokens([2], given_tokens([log_p]), rows=[0]))
        assert np.isfinite(gradient).all() and gradient[0, 2] > 0


@pytest.mark.parametrize("objective", EVERY)
def test_vocabulary_that_nobody_can_say_does_no_harm(objective: Any) -> None:
    z_q, tokens, _ = long_case(0)
    z_q[:, 5] = -np.inf
    labels = np.where(tokens.labels == 5, 4, tokens.labels)
    value, gradient = run(objective(), z_q, Tokens(labels, tokens.signal, tokens.weights, tokens.rows))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[:, 5].any()


@pytest.mark.parametrize("objective", EVERY)
def test_no_tokens_are_a_sum_of_nothing(objective: Any) -> None:
    value, gradient = run(objective(), np.zeros((0, VOCABULARY)), Tokens(signal=given_tokens(np.zeros(0))))
    assert value == 0.0 and gradient.shape == (0, VOCABULARY)


@pytest.mark.parametrize("objective", EVERY)
def test_a_signal_without_given_tokens_is_named(objective: Any) -> None:
    with pytest.raises(ValueError, match=f"{objective().type} reads .*label_logprobs.* got no signal"):
        run(objective(), logits(0, 2, VOCABULARY), Tokens(rows=[0, 0]))


def test_a_signal_may_tell_the_given_token_s_probability_from_the_outputs() -> None:
    class Teller:
        def chunk(self, start: int, stop: int) -> Teller:
            return self

        def label_logprobs(self, outputs: TokenLogits) -> Tensor:
            return -outputs.labels.float()

    z_q, tokens, _ = long_case(0)
    for objective in EVERY:
        told = run(objective(), z_q, Tokens(tokens.labels, Teller(), tokens.weights, tokens.rows))
        same(told, run(objective(), z_q, Tokens(tokens.labels, given_tokens(-tokens.labels), tokens.weights, tokens.rows)))


def test_whole_sequences_need_to_know_their_rows() -> None:
    with pytest.raises(ValueError, match="which row each of its 2 tokens is of"):
        run(ReverseKLRewardToGo(), logits(0, 2, VOCABULARY), Tokens([0, 1], given_tokens([-1.0, -1.0])))


def test_only_the_sequence_horizon_asks_for_a_first_pass() -> None:
    assert isinstance(ReverseKLRewardToGo(), TwoPass)
    assert not any(isinstance(o(), TwoPass) for o in SINGLE)


def test_limits_and_discounts_move_with_progress() -> None:
    z_q, tokens, _ = long_case(1)
    half = Progress(step=5, steps=10)
    slow = ReverseKLPolicyGradient(clip=Ramp(ramp=(0.5, 1.5)))
    same(run(slow, z_q, tokens, progress=half), run(ReverseKLPolicyGradient(clip=1.0), z_q, tokens))
    slow_row = ReverseKLRewardToGo(discount=Ramp(ramp=(0.0, 1.0)))
    same(run(slow_row, z_q, tokens, progress=half), run(ReverseKLRewardToGo(discount=0.5), z_q, tokens))
    assert not np.allclose(run(slow_row, z_q, tokens)[1], run(slow_row, z_q, tokens, progress=half)[1])


@pytest.mark.parametrize("settings", [{"clip": 0.0}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    for objective in EVERY:
        with pytest.raises(ValidationError):
            objective(**settings)
    with pytest.raises(ValidationError, match="from 0 to 1"):
        ReverseKLRewardToGo(discount=1.1)


def test_the_clipped_surrogate_is_flat_where_the_ratio_has_gone_far_enough() -> None:
    ratios, gains = np.asarray([1.0, 1.5, 1.5, 0.5, 0.5, 1.1]), np.asarray([2.0, 2.0, -2.0, 2.0, -2.0, -1.0])
    log_q = torch.from_numpy(np.log(ratios)).requires_grad_()
    value = clipped_surrogate(log_q, torch.zeros(6, dtype=torch.float64), torch.from_numpy(gains))
    (gradient,) = torch.autograd.grad(value.sum(), log_q)
    np.testing.assert_allclose(value.detach().numpy(), -np.minimum(ratios * gains, np.clip(ratios, 0.8, 1.2) * gains))
    np.testing.assert_allclose(gradient.numpy(), np.asarray([-2.0, 0.0, 3.0, -1.0, 0.0, 1.1]))


def test_the_first_update_of_the_clipped_surrogate_is_the_policy_gradient() -> None:
    z_q, tokens, d = long_case(2)
    z = torch.from_numpy(z_q).double().requires_grad_()
    log_q = z.log_softmax(-1)[torch.arange(len(z)), torch.as_tensor(tokens.labels)]
    value = (torch.from_numpy(tokens.weights) * clipped_surrogate(log_q, log_q.detach(), torch.from_numpy(d))).sum()
    (gradient,) = torch.autograd.grad(value, z)
    _, want = run(ReverseKLPolicyGradient(), z_q, tokens)
    np.testing.assert_allclose(want, gradient.numpy(), atol=2e-5)


def test_advantages_carry_no_gradient_into_the_clipped_surrogate() -> None:
    log_q, gains = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    clipped_surrogate(log_q, torch.zeros(3), gains).sum().backward()
    assert gains.grad is None and log_q.grad is not None


def test_a_micro_batch_without_tokens_has_no_rows() -> None:
    assert token_rows(None, 0, torch.device("cpu"), "x").shape == (0,)
