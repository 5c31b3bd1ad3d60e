"""Divergences and their objective against float64 formulas: values, gradients, and the ends of their ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strategies.core import Progress
from strategies.head import TokenLogits
from strategies.objectives.divergence import ForwardKL, forward_kl, reverse_kl
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import Ramp
from strategies.signals import TopK
from tests.strategies import reference

SEEDS = range(4)
NOW = Progress(step=0, steps=10)
TOKENS, VOCABULARY = 6, 19


def logits(seed: int, size: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, (TOKENS, VOCABULARY)).astype(np.float32)


def whole_teacher(z_p: np.ndarray) -> TopK:
    """A teacher of which nothing is cut off."""
    ids, logprobs = reference.top(z_p, VOCABULARY)
    return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float())


def student(z_q: np.ndarray) -> TokenLogits:
    return TokenLogits(torch.from_numpy(z_q.copy()).requires_grad_(), torch.zeros(len(z_q), dtype=torch.int64))


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


def test_forward_kl_ignores_what_the_teacher_rules_out_and_reverse_kl_forbids_it() -> None:
    log_q = torch.tensor([[0.5, 0.5]]).log()
    log_p = torch.tensor([[1.0, 0.0]]).log()
    assert forward_kl(log_q, log_p).item() == pytest.approx(np.log(2))
    assert reverse_kl(log_q, log_p).item() == np.inf


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
