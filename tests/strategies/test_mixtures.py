"""Generalised JSD, skew KLs, alpha and Rényi divergences: ends, limits, symmetries and bounds, beyond what all objectives share."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from strategies.objectives import OBJECTIVES
from strategies.objectives.divergence import forward_kl, reverse_kl
from strategies.objectives.mixtures import JSD, alpha_divergence, jsd, renyi, skew_kl, skew_reverse_kl
from tests.strategies import reference
from tests.strategies import reference_divergences as ref
from tests.strategies.families import logits

SEEDS = range(4)
INNER = (0.001, 0.1, 0.5, 0.7, 0.999)


def sides(seed: int, size: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    q, p = (torch.from_numpy(logits(s, size=size)).to(dtype).log_softmax(-1) for s in (seed, seed + 100))
    return q, p


def slope_of(divergence: Callable[[Tensor, Tensor], Tensor], log_q: Tensor, log_p: Tensor) -> Tensor:
    z = log_q.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergence(z.log_softmax(-1), log_p).sum(), z)
    return slope


RULES: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    *((f"jsd {b}", lambda q, p, b=b: jsd(q, p, b)) for b in INNER),
    *((f"jsd {b} unscaled", lambda q, p, b=b: jsd(q, p, b, rescale=False)) for b in INNER),
    *((f"skew {s}", lambda q, p, s=s: skew_kl(q, p, s)) for s in (0.0, 0.01, 0.1, 0.9)),
    *((f"reverse skew {s}", lambda q, p, s=s: skew_reverse_kl(q, p, s)) for s in (0.0, 0.01, 0.1, 0.9)),
    *((f"alpha {a}", lambda q, p, a=a: alpha_divergence(q, p, a)) for a in INNER),
    *((f"renyi {a}", lambda q, p, a=a: renyi(q, p, a)) for a in (0.1, 0.99, 1.01, 1.5, 3.0)),
]


@pytest.mark.parametrize(("name", "rule"), RULES, ids=[name for name, _ in RULES])
def test_analytic_slopes_are_the_derivatives_of_their_values(name: str, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    for seed in SEEDS:
        log_q, log_p = (side[:3, :5].log_softmax(-1) for side in sides(seed, dtype=torch.float64))
        assert torch.autograd.gradcheck(lambda x, p=log_p: rule(x.log_softmax(-1), p), (log_q.clone().requires_grad_(),))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rescaled_jsd_runs_from_forward_to_reverse_without_a_jump(seed: int) -> None:
    log_q, log_p = sides(seed)
    for end, near, exact in ((0.0, 1e-6, forward_kl), (1.0, 1 - 1e-6, reverse_kl)):
        assert torch.equal(jsd(log_q, log_p, end), exact(log_q, log_p))
        torch.testing.assert_close(jsd(log_q, log_p, near), exact(log_q, log_p), rtol=1e-3, atol=0)
        close = slope_of(lambda q, p, b=near: jsd(q, p, b), log_q, log_p)
        torch.testing.assert_close(close, slope_of(exact, log_q, log_p), rtol=1e-2, atol=1e-3)


def test_without_rescaling_the_ends_are_special_and_the_rest_vanishes_towards_them() -> None:
    log_q, log_p = sides(0)
    assert torch.equal(jsd(log_q, log_p, 0.0, rescale=False), forward_kl(log_q, log_p))
    assert torch.equal(jsd(log_q, log_p, 1.0, rescale=False), reverse_kl(log_q, log_p))
    assert (jsd(log_q, log_p, 0.001, rescale=False) < 2e-3 * forward_kl(log_q, log_p)).all()


@pytest.mark.parametrize("beta", INNER)
@pytest.mark.parametrize("rescale", [True, False])
def test_jsd_mirrors_when_the_sides_change_places(beta: float, rescale: bool) -> None:
    for seed in SEEDS:
        log_q, log_p = sides(seed)
        mirrored = jsd(log_p, log_q, 1 - beta, rescale)
        torch.testing.assert_close(jsd(log_q, log_p, beta, rescale), mirrored, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1.0, 10.0, 60.0])
def test_bounded_divergences_keep_their_bounds(size: float) -> None:
    for seed in SEEDS:
        log_q, log_p = sides(seed, size)
        assert (jsd(log_q, log_p, 0.5, rescale=False) <= math.log(2) + 1e-6).all()
        assert (skew_kl(log_q, log_p, 0.1) <= math.log(10) + 1e-5).all()
        assert (skew_reverse_kl(log_q, log_p, 0.1) <= math.log(10) + 1e-5).all()
        assert (alpha_divergence(log_q, log_p, 0.3) <= 1 / 0.21 + 1e-5).all()


def test_bounds_are_reached_and_finite_where_the_sides_share_nothing() -> None:
    log_q, log_p = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    assert jsd(log_q, log_p, 0.5, rescale=False).item() == pytest.approx(math.log(2), rel=1e-5)
    assert jsd(log_q, log_p, 0.9, rescale=False).item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-5)
    assert skew_kl(log_q, log_p, 0.1).item() == pytest.approx(math.log(10), rel=1e-5)
    assert skew_reverse_kl(log_q, log_p, 0.1).item() == pytest.approx(math.log(10), rel=1e-5)
    for alpha in (0.001, 0.3, 0.8, 0.999):
        assert alpha_divergence(log_q, log_p, alpha).item() == pytest.approx(1 / (alpha * (1 - alpha)), rel=1e-4)
    for divergence in (lambda q, p: jsd(q, p, 0.3), lambda q, p: skew_reverse_kl(q, p, 0.1), lambda q, p: alpha_divergence(q, p, 0.5)):
        assert slope_of(divergence, torch.tensor([[20.0, -90.0]]), log_p).isfinite().all()


@pytest.mark.parametrize("size", [2.0, 40.0, 150.0])
def test_far_apart_sides_match_the_formula_whatever_the_float_holds(size: float) -> None:
    """At 150, probabilities of both sides underflow float32."""
    z_q, z_p = logits(0, size=size), logits(100, size=size)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    log_q, log_p = (torch.from_numpy(z).log_softmax(-1) for z in (z_q, z_p))
    close = {"rtol": 3e-5, "atol": 1e-6}
    for beta in INNER:
        np.testing.assert_allclose(jsd(log_q, log_p, beta).numpy(), ref.gjsd(q, p, beta), **close)
    for skew in (0.01, 0.1, 0.9):
        np.testing.assert_allclose(skew_kl(log_q, log_p, skew).numpy(), ref.skew_fkl(q, p, skew), **close)
        np.testing.assert_allclose(skew_reverse_kl(log_q, log_p, skew).numpy(), ref.skew_rkl(q, p, skew), **close)
    for alpha in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(alpha_divergence(log_q, log_p, alpha).numpy(), ref.amari(q, p, alpha), **close)
    for alpha in (0.1, 0.5, 0.9, 1.2):
        np.testing.assert_allclose(renyi(log_q, log_p, alpha).numpy(), ref.renyi(q, p, alpha), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_skews_at_zero_are_the_kls_and_shrink_towards_one(seed: int) -> None:
    log_q, log_p = sides(seed)
    for skewed, exact in ((skew_kl, forward_kl), (skew_reverse_kl, reverse_kl)):
        assert torch.equal(skewed(log_q, log_p, 0.0), exact(log_q, log_p))
        torch.testing.assert_close(skewed(log_q, log_p, 1e-6), exact(log_q, log_p), rtol=1e-3, atol=0)
        values = [skewed(log_q, log_p, s).sum().item() for s in (0.0, 0.1, 0.5, 0.9, 0.99)]
        assert values == sorted(values, reverse=True) and values[-1] < 1e-3 * values[0]


def test_detaching_the_mixture_keeps_the_value_and_changes_the_gradient() -> None:
    log_q, log_p = sides(0)
    assert torch.equal(skew_reverse_kl(log_q, log_p, 0.1), skew_reverse_kl(log_q, log_p, 0.1, detach_mix=True))
    q, p = log_q.double().exp(), log_p.double().exp()
    over = (q / (0.1 * q + 0.9 * p)).log()
    wanted = q * (over - (q * over).sum(-1, keepdim=True))
    got = slope_of(lambda q, p: skew_reverse_kl(q, p, 0.1, detach_mix=True), log_q, log_p)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)
    assert (got - slope_of(lambda q, p: skew_reverse_kl(q, p, 0.1), log_q, log_p)).abs().max() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_alpha_runs_from_reverse_to_forward_and_is_hellinger_in_the_middle(seed: int) -> None:
    log_q, log_p = sides(seed)
    for end, near, exact in ((0.0, 1e-6, reverse_kl), (1.0, 1 - 1e-6, forward_kl)):
        assert torch.equal(alpha_divergence(log_q, log_p, end), exact(log_q, log_p))
        torch.testing.assert_close(alpha_divergence(log_q, log_p, near), exact(log_q, log_p), rtol=1e-3, atol=0)
        close = slope_of(lambda q, p, a=near: alpha_divergence(q, p, a), log_q, log_p)
        torch.testing.assert_close(close, slope_of(exact, log_q, log_p), rtol=1e-2, atol=1e-3)
    hellinger = 0.5 * ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)
    torch.testing.assert_close(alpha_divergence(log_q, log_p, 0.5), 4 * hellinger, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.999])
def test_alpha_mirrors_when_the_sides_change_places(alpha: float) -> None:
    log_q, log_p = sides(1)
    torch.testing.assert_close(alpha_divergence(log_q, log_p, alpha), alpha_divergence(log_p, log_q, 1 - alpha), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [0.01, 2.0, 20.0])
def test_renyi_is_forward_kl_at_one_from_both_sides_and_never_falls_with_alpha(size: float) -> None:
    for seed in SEEDS:
        log_q, log_p = sides(seed, size)
        assert torch.equal(renyi(log_q, log_p, 1.0), forward_kl(log_q, log_p))
        for near in (1 - 1e-4, 1 + 1e-4):
            torch.testing.assert_close(renyi(log_q, log_p, near), forward_kl(log_q, log_p), rtol=1e-2, atol=1e-7)
        values = torch.stack([renyi(log_q, log_p, a) for a in (0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0)])
        assert (values.diff(dim=0) >= -1e-4 * values[1:]).all()


LOGITS = st.lists(st.tuples(st.floats(-30, 30, width=32), st.floats(-30, 30, width=32)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.floats(0, 1), st.floats(0.01, 4))
def test_no_divergence_is_below_zero_or_without_a_gradient(pairs: list[tuple[float, float]], share: float, order: float) -> None:
    z = torch.tensor(pairs, dtype=torch.float32)
    log_q, log_p = z[:, 0][None].log_softmax(-1), z[:, 1][None].log_softmax(-1)
    rules: list[Callable[[Tensor, Tensor], Tensor]] = [
        forward_kl,
        reverse_kl,
        lambda q, p: jsd(q, p, share),
        lambda q, p: jsd(q, p, share, rescale=False),
        lambda q, p: skew_kl(q, p, min(share, 0.99)),
        lambda q, p: skew_reverse_kl(q, p, min(share, 0.99)),
        lambda q, p: alpha_divergence(q, p, share),
        lambda q, p: renyi(q, p, order),
    ]
    for rule in rules:
        assert rule(log_q, log_p).item() >= 0 or rule(log_q, log_p).item() == pytest.approx(0, abs=1e-6)
        assert slope_of(rule, log_q, log_p).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "given_settings"),
    [
        ("jsd", {"beta": 1.2}),
        ("jsd", {"beta": {"ramp": [0.0, 0.5]}, "rescale": False}),
        ("jsd", {"beta": {"cosine": [0.5, 1.0]}, "rescale": False}),
        ("skew-kl", {"skew": 1.0}),
        ("skew-kl", {"skew": -0.1}),
        ("skew-kl", {"detach_mix": True}),
        ("skew-reverse-kl", {"skew": {"ramp": [0.1, 1.0]}}),
        ("alpha", {"alpha": 2.0}),
        ("renyi", {"alpha": 0.0}),
        ("adaptive-kl", {"head_mass": 1.5}),
        ("taid", {"progress_share": {"ramp": [0.3, 1.1]}}),
        ("cross-entropy", {"smoothing": -0.1}),
        ("forward-kl", {"temperature": 0.0}),
        ("total-variation", {"t_scale": "square"}),
    ],
)
def test_settings_out_of_range_are_refused(kind: str, given_settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OBJECTIVES[kind].model_validate(given_settings)


def test_the_literal_ends_of_gkd_may_be_asked_for() -> None:
    assert JSD(beta=0.0, rescale=False).beta == 0.0
    assert JSD.model_validate({"beta": 1, "rescale": False}).beta == 1.0
    assert JSD.model_validate({"beta": {"ramp": [0.0, 1.0]}}).rescale
