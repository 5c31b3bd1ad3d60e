"""TAID: the moving target's ends, and the pace that moves it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.core import Progress
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.taid import Taid, TaidPace, TaidState, interpolated, taid_update
from tests.strategies import reference
from tests.strategies import reference_divergences as ref
from tests.strategies.families import dense, logits, loss_and_gradient

SEEDS = range(4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_whole_teacher_gives_forward_kls_gradient_and_its_value_plus_the_teachers_entropy(seed: int, temperature: float) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    loss, slope = loss_and_gradient(Taid(progress_share=1.0, temperature=temperature), z_q, dense(z_p))
    kl, kl_slope = loss_and_gradient(ForwardKL(temperature=temperature), z_q, dense(z_p))
    np.testing.assert_allclose(slope, kl_slope, atol=1e-6)
    p = reference.softmax(z_p, temperature)
    assert loss == pytest.approx(kl - temperature**2 * (p * np.log(p)).sum(), rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_students_own_target_teaches_nothing(seed: int) -> None:
    _, slope = loss_and_gradient(Taid(progress_share=0.0), logits(seed), dense(logits(seed + 100)))
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_logits_are_interpolated_and_what_one_side_rules_out_stays_out(share: float) -> None:
    z_q, z_p = logits(0), logits(100)
    log_q, log_p = (torch.from_numpy(z).log_softmax(-1) for z in (z_q, z_p))
    np.testing.assert_allclose(interpolated(log_q, log_p, share).exp().numpy(), ref.taid_target(z_q, z_p, share), atol=1e-6)
    log_q[:, 0], log_q[:, 1], log_p[:, 1], log_p[:, 2] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    target = interpolated(log_q.log_softmax(-1), log_p.log_softmax(-1), share).exp()
    torch.testing.assert_close(target.sum(-1), torch.ones(6))
    assert not target[:, 1].any()
    assert target[:, 0].any() == (share == 1.0) and target[:, 2].any() == (share == 0.0)


def test_the_default_moves_from_a_part_of_the_teacher_to_all_of_it() -> None:
    z_q, z_p = logits(0), dense(logits(100))
    for step, share in ((0, 0.3), (5, 0.65), (10, 1.0)):
        moved = loss_and_gradient(Taid(), z_q, z_p, progress=Progress(step=step, steps=10))[0]
        assert moved == pytest.approx(loss_and_gradient(Taid(progress_share=share), z_q, z_p)[0], rel=1e-6)


def shares(losses: list[float], pace: TaidPace) -> list[float]:
    state, found = TaidState(pace.start), []
    for step, loss in enumerate(losses):
        state = taid_update(state, loss, Progress(step=step, steps=len(losses)), pace)
        found.append(state.share)
    return found


@pytest.mark.parametrize("rate", [5e-4, 0.05, 0.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_pace_is_that_of_the_recurrence(seed: int, rate: float) -> None:
    draw = np.random.default_rng(seed)
    losses = (5 * np.exp(-np.arange(60) / 20) + draw.random(60)).tolist()
    pace = TaidPace(start=0.2, end=0.95, rate=rate, inertia=0.9)
    np.testing.assert_allclose(shares(losses, pace), ref.taid_shares(losses, 0.2, 0.95, rate, 0.9), rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 0.9), st.floats(0, 1))
def test_the_share_never_falls_and_never_lags_behind_the_line(losses: list[float], start: float, rate: float) -> None:
    pace = TaidPace(start=start, rate=rate)
    found = [start, *shares(losses, pace)]
    assert all(a <= b for a, b in pairwise(found))
    for n, share in enumerate(found[1:]):
        assert start + (1 - start) * n / len(losses) <= share + 1e-12 and share <= 1.0


def test_a_falling_loss_quickens_the_pace_and_the_first_call_only_remembers() -> None:
    pace, early = TaidPace(rate=0.1, inertia=0.0), Progress(step=1, steps=10**9)
    first = taid_update(TaidState(0.3), 4.0, Progress(step=0, steps=10), pace)
    assert (first.share, first.loss, first.momentum) == (0.3, 4.0, 0.0)
    falling, rising = (taid_update(first, loss, early, pace) for loss in (1.0, 7.0))
    assert falling.share > rising.share > 0.3
    assert falling.share == pytest.approx(0.3 + 0.1 * 0.7 / (1 + math.exp(-0.75)), rel=1e-12)


def test_a_loss_that_leaves_zero_does_not_overflow() -> None:
    state = taid_update(TaidState(0.3, loss=0.0), 5.0, Progress(step=1, steps=10), TaidPace())
    assert state.share == pytest.approx(0.37) and math.isfinite(state.momentum)
