"""Draws from the teacher: averages over them, in expectation over the draws, are those of the whole distribution."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from strategies.objectives.divergence import ForwardKL
from strategies.signals import Sampled
from tests.strategies import reference
from tests.strategies.families import NOW, student

VOCABULARY, DRAWS = 4, 3
PROPOSALS = [0.8, 1.0, 1.2]
"""Powers of p that are drawn from."""


def logits(seed: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, (1, vocabulary)).astype(np.float32)


def proposal(p: np.ndarray, power: float) -> np.ndarray:
    return p**power / (p**power).sum(-1, keepdims=True)


def draws(ids: np.ndarray, p: np.ndarray, r: np.ndarray) -> Sampled:
    """`ids` `(N, n)` drawn from r `(1, V)` while p `(1, V)` is meant."""
    weights = p[0, ids] / (ids.shape[-1] * r[0, ids])
    return Sampled(torch.from_numpy(ids), torch.from_numpy(np.log(p[0, ids])).float(), torch.from_numpy(weights).float())


def values_and_gradients(z_q: np.ndarray, signal: Sampled) -> tuple[np.ndarray, np.ndarray]:
    outputs = student(z_q)
    values = ForwardKL().values(outputs, signal, 1.0, NOW)
    (slope,) = torch.autograd.grad(values.sum(), outputs.logits)
    return values.detach().numpy().astype(np.float64), slope.numpy().astype(np.float64)


@pytest.mark.parametrize("power", PROPOSALS)
@pytest.mark.parametrize("seed", range(3))
def test_the_mean_over_all_possible_draws_is_forward_kl_and_its_gradient(seed: int, power: float) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    r = proposal(p, power)
    ids = np.asarray(list(product(range(VOCABULARY), repeat=DRAWS)))
    chance = r[0, ids].prod(-1)
    values, slopes = values_and_gradients(np.repeat(z_q, len(ids), 0), draws(ids, p, r))
    assert chance.sum() == pytest.approx(1)
    assert (chance * values).sum() == pytest.approx(reference.kl(p, q).item(), rel=1e-5)
    np.testing.assert_allclose(chance @ slopes, (q - p)[0], atol=1e-6)


@pytest.mark.parametrize("power", PROPOSALS)
def test_many_random_draws_come_to_the_same_mean(power: float) -> None:
    rows, n, vocabulary = 4000, 16, 50
    z_q, z_p = logits(1, vocabulary), logits(101, vocabulary)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    r = proposal(p, power)
    ids = np.random.default_rng(7).choice(vocabulary, size=(rows, n), p=r[0])
    values, slopes = values_and_gradients(np.repeat(z_q, rows, 0), draws(ids, p, r))
    assert abs(values.mean() - reference.kl(p, q).item()) < 4 * values.std() / np.sqrt(rows)
    error = slopes.std(0) / np.sqrt(rows) + 1e-7
    assert (np.abs(slopes.mean(0) - (q - p)[0]) < 4.5 * error).all()
    assert error.max() < 3e-3  # the bound says something


def test_drawn_from_the_teacher_itself_the_weights_are_plain_counts() -> None:
    p = reference.softmax(logits(100))
    signal = draws(np.asarray([[0, 2, 2]]), p, p)
    np.testing.assert_allclose(signal.weights.numpy(), 1 / 3, rtol=1e-6)


def test_equal_draws_may_be_merged_or_not_and_padding_of_weight_zero_adds_nothing() -> None:
    z_q, p = logits(0), reference.softmax(logits(100))
    signal = draws(np.asarray([[2, 0, 2]]), p, p)
    padding = torch.tensor([[-torch.inf]])
    merged = Sampled(
        torch.tensor([[2, 0, 1]]),
        torch.cat([signal.logprobs[:, :2], padding], -1),
        torch.tensor([[2 / 3, 1 / 3, 0.0]]),
    )
    z_q[0, 1] = -np.inf  # also where the student rules the padding out
    for a, b in zip(values_and_gradients(z_q, signal), values_and_gradients(z_q, merged), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.isfinite(b).all()


def test_draws_are_cut_by_tokens() -> None:
    columns = (torch.arange(8).reshape(4, 2), -torch.rand(4, 2), torch.rand(4, 2))
    piece = Sampled(*columns).chunk(1, 3)
    for mine, whole in zip((piece.ids, piece.logprobs, piece.weights), columns, strict=True):
        assert torch.equal(mine, whole[1:3])


def test_no_gradient_flows_into_what_was_drawn() -> None:
    signal = Sampled(torch.tensor([[1]]), torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[1.0]], requires_grad=True))
    ForwardKL()(student(logits(0)), signal, torch.ones(1), NOW).backward()
    assert signal.logprobs.grad is None and signal.weights.grad is None
