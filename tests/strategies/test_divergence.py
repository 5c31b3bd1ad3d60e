"""Divergences and their objective against float64 formulas: values, gradients, and the ends of their ranges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.core import Progress
from strategies.head import TokenLogits
from strategies.objectives.divergence import (
    HEAD_TOKENS,
    ForwardKL,
    ReverseKL,
    TotalVariation,
    adaptive_kl,
    forward_kl,
    head_share,
    jeffreys,
    reverse_kl,
    total_variation,
)
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import Ramp
from strategies.signals import TopK
from tests.strategies import reference
from tests.strategies.families import NOW, dense, logits, loss_and_gradient, student
from tests.strategies.reference_divergences import akl_share

SEEDS = range(4)
TOKENS, VOCABULARY = 6, 19
Divergence = Callable[[Tensor, Tensor], Tensor]


def whole_teacher(z_p: np.ndarray) -> TopK:
    """A teacher of which nothing is cut off."""
    ids, logprobs = reference.top(z_p, VOCABULARY)
    return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float())


def kl_and_gradient(z_q: np.ndarray, z_p: np.ndarray, temperature: float, t_scale: str = "auto") -> tuple[float, np.ndarray]:
    outputs = student(z_q)
    objective = ForwardKL(temperature=temperature, t_scale="auto" if t_scale == "auto" else "none")
    loss = objective(outputs, whole_teacher(z_p), torch.ones(len(z_q)), NOW)
    (gradient,) = torch.autograd.grad(loss, outputs.logits)
    return loss.item(), gradient.numpy()


@pytest.mark.parametrize("seed", SEEDS)
def test_both_directions_match_their_definition(seed: int) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    log_q, log_p = torch.from_numpy(np.log(q)).float(), torch.from_numpy(np.log(p)).float()
    np.testing.assert_allclose(forward_kl(log_q, log_p).numpy(), reference.kl(p, q), rtol=1e-5)
    np.testing.assert_allclose(reverse_kl(log_q, log_p).numpy(), reference.kl(q, p), rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_forward_gradient_is_q_minus_p(seed: int) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    _, gradient = kl_and_gradient(z_q, z_p, 1.0)
    np.testing.assert_allclose(gradient, reference.softmax(z_q) - reference.softmax(z_p), atol=2e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reverse_gradient_is_q_times_its_centred_log_ratio(seed: int) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    z = torch.from_numpy(z_q).requires_grad_()
    (gradient,) = torch.autograd.grad(reverse_kl(z.log_softmax(-1), torch.from_numpy(np.log(p)).float()).sum(), z)
    expected = q * (np.log(q) - np.log(p) - reference.kl(q, p)[:, None])
    np.testing.assert_allclose(gradient.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_temperature_divides_both_sides_and_its_square_multiplies(seed: int, temperature: float) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    q, p = reference.softmax(z_q, temperature), reference.softmax(z_p, temperature)
    value, gradient = kl_and_gradient(z_q, z_p, temperature)
    assert value == pytest.approx(temperature**2 * reference.kl(p, q).sum(), rel=1e-5)
    np.testing.assert_allclose(gradient, temperature * (q - p), atol=5e-6)
    unscaled, _ = kl_and_gradient(z_q, z_p, temperature, t_scale="none")
    assert unscaled == pytest.approx(reference.kl(p, q).sum(), rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_very_high_temperature_matches_centred_logits(seed: int) -> None:
    z_q, z_p = logits(seed, size=1.0), logits(seed + 100, size=1.0)
    _, gradient = kl_and_gradient(z_q, z_p, 1000.0)
    centred = [z - z.mean(-1, keepdims=True) for z in (z_q.astype(np.float64), z_p.astype(np.float64))]
    expected = (centred[0] - centred[1]) / VOCABULARY
    np.testing.assert_allclose(gradient, expected, atol=5e-3 * np.abs(expected).max())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(seed: int, temperature: float) -> None:
    z = logits(seed)
    value, gradient = kl_and_gradient(z, z, temperature)
    assert abs(value) < 1e-5
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("direction", [forward_kl, reverse_kl])
def test_a_token_impossible_on_both_sides_adds_nothing_and_stays_finite(direction: object) -> None:
    assert callable(direction)
    z_q = torch.tensor([[0.3, -0.2, -torch.inf]], requires_grad=True)
    z_p = torch.tensor([[0.1, 0.9, -torch.inf]])
    value = direction(z_q.log_softmax(-1), z_p.log_softmax(-1)).sum()
    (gradient,) = torch.autograd.grad(value, z_q)
    alone = direction(z_q[:, :2].log_softmax(-1), z_p[:, :2].log_softmax(-1)).sum()
    assert value.item() == pytest.approx(alone.item(), rel=1e-6)
    assert gradient.isfinite().all() and gradient[0, 2] == 0


def test_forward_kl_ignores_what_the_teacher_rules_out_and_reverse_kl_leaves_it_out_on_both_sides() -> None:
    z_q = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    log_p = torch.tensor([[0.6, 0.4, 0.0]]).log()
    q, p = reference.softmax([[0.3, -0.2, 1.0]]), np.asarray([[0.6, 0.4, 0.0]])
    assert forward_kl(z_q.log_softmax(-1), log_p).item() == pytest.approx(reference.kl(p, q).item(), rel=1e-5)
    value = reverse_kl(z_q.log_softmax(-1), log_p)
    (gradient,) = torch.autograd.grad(value.sum(), z_q)
    q, p = q[:, :2] / q[:, :2].sum(), p[:, :2]
    assert value.item() == pytest.approx(reference.kl(q, p).item(), abs=1e-7)
    np.testing.assert_allclose(gradient[:, :2].numpy(), q * (np.log(q / p) - reference.kl(q, p)), atol=1e-6)
    np.testing.assert_allclose(gradient[:, 2].numpy(), 0.0, atol=1e-7)


def test_forward_kl_has_no_bound_where_the_student_rules_out_what_the_teacher_says() -> None:
    log_q, log_p = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert forward_kl(log_q, log_p).item() == np.inf


def test_a_student_wholly_outside_what_the_teacher_can_say_is_finite_in_reverse() -> None:
    log_q = torch.tensor([[0.0, 1.0]]).log().requires_grad_()
    value = reverse_kl(log_q, torch.tensor([[1.0, 0.0]]).log())
    (gradient,) = torch.autograd.grad(value.sum(), log_q)
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_total_variation_is_bounded_and_pinskers_inequality_holds(seed: int) -> None:
    z_q, z_p = (torch.from_numpy(logits(s, size=6.0)).log_softmax(-1) for s in (seed, seed + 100))
    tv, kl = total_variation(z_q, z_p), forward_kl(z_q, z_p)
    assert (tv <= 1 + 1e-6).all() and (2 * tv**2 <= kl + 1e-6).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_total_variation_gradient_is_one_of_signs_and_tends_to_a_constant_in_t(seed: int) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    sign = np.sign(q - p)
    z = torch.from_numpy(z_q).requires_grad_()
    (gradient,) = torch.autograd.grad(total_variation(z.log_softmax(-1), torch.from_numpy(np.log(p)).float()).sum(), z)
    np.testing.assert_allclose(gradient.numpy(), 0.5 * q * (sign - (q * sign).sum(-1, keepdims=True)), atol=1e-6)
    _, hot = loss_and_gradient(TotalVariation(temperature=500.0), z_q, dense(z_p))
    centred = [x - x.mean(-1, keepdims=True) for x in (z_q, z_p)]
    sign = np.sign(centred[0] - centred[1])
    np.testing.assert_allclose(hot, (sign - sign.mean(-1, keepdims=True)) / (2 * VOCABULARY), rtol=5e-2, atol=1e-4)


@pytest.mark.parametrize("mass", [0.0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_adaptive_share_walks_down_the_teachers_choices(seed: int, mass: float) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    share = head_share(torch.from_numpy(np.log(q)), torch.from_numpy(np.log(p)), mass)
    np.testing.assert_allclose(share.numpy(), akl_share(q, p, mass), rtol=1e-9)
    assert ((share >= 0) & (share <= 1)).all()


def test_a_head_longer_than_what_is_looked_at_first_is_followed_to_its_end() -> None:
    z_q, z_p = (logits(s, (3, 2 * HEAD_TOKENS), 0.5) for s in (0, 100))
    z_p[0, 7] = 20.0  # this head is one token, the others are hundreds
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    for mass in (0.2, 0.9):
        share = head_share(torch.from_numpy(np.log(q)), torch.from_numpy(np.log(p)), mass)
        np.testing.assert_allclose(share.numpy(), akl_share(q, p, mass), rtol=1e-9)


def test_adaptive_kl_splits_evenly_where_there_is_no_gap_and_goes_forward_where_all_of_it_is_in_the_head() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert head_share(log_p, log_p, 0.5).item() == 0.5
    assert head_share(torch.tensor([[0.4, 0.4, 0.2]]).log(), log_p, 0.9).item() == 1.0
    z = log_p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(adaptive_kl(z, log_p, 0.5).sum(), z)
    assert adaptive_kl(log_p, log_p, 0.5).item() == 0.0 and not gradient.any()


def test_jeffreys_is_symmetric_and_the_whole_sum() -> None:
    log_q, log_p = (torch.from_numpy(logits(s)).double().log_softmax(-1) for s in (0, 100))
    assert torch.allclose(jeffreys(log_q, log_p), jeffreys(log_p, log_q))
    assert torch.allclose(jeffreys(log_q, log_p), ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jeffreys, total_variation])
def test_analytic_slopes_are_the_derivatives_of_their_values(divergence: Divergence) -> None:
    for seed in SEEDS:
        z = torch.from_numpy(logits(seed)[:3, :5]).double().requires_grad_()
        log_p = torch.from_numpy(logits(seed + 100)[:3, :5]).double().log_softmax(-1)
        assert torch.autograd.gradcheck(lambda x, p=log_p: divergence(x.log_softmax(-1), p), (z,))
        assert torch.autograd.gradcheck(lambda x, p=log_p: divergence(x, p), (z.detach().log_softmax(-1).requires_grad_(),))


def test_a_whole_vocabulary_at_top_k_costs_may_go_below_zero_only_without_its_tail() -> None:
    z_p = logits(100)
    ids, logprobs = reference.top(z_p, 3)
    signal = [TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float(), tail) for tail in ("drop", "bucket", "renormalise")]
    z_q = np.full_like(z_p, -30.0)
    np.put_along_axis(z_q, ids, logprobs.astype(np.float32), -1)
    values = [ForwardKL().values(student(z_q), s, 1.0, NOW) for s in signal]
    assert (values[0] < 0).all() and (values[1] > 0).all() and values[2].abs().max() < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_truncated_reverse_gradient_pulls_on_every_logit(seed: int) -> None:
    """Outside S it is `-q (L + Q_S)` with `L = sum_S q (log q - log p)`."""
    z_q, z_p = logits(seed), logits(seed + 100)
    ids, logprobs = reference.top(z_p, 5)
    q = reference.softmax(z_q)
    kept = np.take_along_axis(q, ids, -1)
    cost = (kept * (np.log(kept) - logprobs)).sum(-1)
    loss, gradient = loss_and_gradient(ReverseKL(), z_q, TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float(), "drop"))
    assert loss == pytest.approx(cost.sum(), rel=1e-5)
    outside = np.ones_like(q, dtype=bool)
    np.put_along_axis(outside, ids, False, -1)
    np.testing.assert_allclose(gradient[outside], (-q * (cost + kept.sum(-1))[:, None])[outside], atol=2e-6)


def test_weights_multiply_tokens_and_the_result_is_a_sum_not_a_mean() -> None:
    z_q, z_p = logits(0), logits(100)
    weights = np.asarray([0.0, 1.0, 2.0, 0.5, 0.0, 3.0], dtype=np.float32)
    per_token = reference.kl(reference.softmax(z_p), reference.softmax(z_q))
    loss = ForwardKL()(student(z_q), whole_teacher(z_p), torch.from_numpy(weights), NOW)
    assert loss.item() == pytest.approx((weights * per_token).sum(), rel=1e-5)


def test_a_scheduled_temperature_moves_with_progress() -> None:
    z_q, z_p = logits(0), logits(100)
    objective = ForwardKL(temperature=Ramp(ramp=(1.0, 3.0)))
    loss = objective(student(z_q), whole_teacher(z_p), torch.ones(TOKENS), Progress(step=5, steps=10))
    assert loss.item() == pytest.approx(kl_and_gradient(z_q, z_p, 2.0)[0], rel=1e-6)


def test_a_divergence_without_a_signal_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="names no signal"):
        ForwardKL()(student(logits(0)), None, torch.ones(TOKENS), NOW)


@pytest.mark.parametrize("seed", SEEDS)
def test_cross_entropy_is_minus_log_q_of_the_label_whatever_the_temperature_of_others(seed: int) -> None:
    z_q, labels = logits(seed), np.random.default_rng(seed).integers(0, VOCABULARY, TOKENS)
    outputs = TokenLogits(torch.from_numpy(z_q).requires_grad_(), torch.from_numpy(labels))
    ForwardKL(temperature=3.0)(outputs, whole_teacher(logits(seed + 100)), torch.ones(TOKENS), NOW)  # shares the pass
    loss = CrossEntropy()(outputs, None, torch.ones(TOKENS), NOW)
    (gradient,) = torch.autograd.grad(loss, outputs.logits)
    expected = -np.log(reference.softmax(z_q)[np.arange(TOKENS), labels]).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient.numpy(), reference.cross_entropy_gradient(z_q, labels), atol=1e-6)


def test_without_its_tail_reverse_kl_is_finite_where_the_student_rules_a_kept_token_out() -> None:
    z_q, z_p = logits(0), logits(100)
    ids, logprobs = reference.top(z_p, 3)
    np.put_along_axis(z_q, ids[:, :1], -np.inf, -1)
    signal = TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float(), "drop")
    assert ReverseKL().values(student(z_q), signal, 1.0, NOW).isfinite().all()


def test_a_token_at_which_the_mass_is_reached_exactly_is_of_the_head() -> None:
    p, q = (torch.tensor([shares], dtype=torch.float64) for shares in ([0.5, 0.25, 0.125, 0.125], [0.25, 0.5, 0.125, 0.125]))
    assert head_share(q.log(), p.log(), 0.75).item() == pytest.approx(1.0)
