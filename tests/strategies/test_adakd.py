"""AdaKD: difficulty, the hardest share and its controller, and a temperature for each token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from strategies.core import Progress, TwoPass
from strategies.objectives.adakd import (
    LATF,
    AdaKD,
    AdaKDAbsolute,
    LATFState,
    TemperedPerToken,
    hardest,
    hellinger,
    idts_temperatures,
    latf_update,
)
from strategies.objectives.divergence import ForwardKL, ReverseKL
from strategies.schedule import Ramp
from strategies.signals import TopK
from tests.strategies import reference
from tests.strategies import reference_weighting as exact
from tests.strategies.chunking import Tokens, dense, floats, run, same

SEEDS = range(4)
TOKENS, VOCABULARY = 9, 11
HALF = Progress(step=5, steps=10)


def logits(seed: int, tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (tokens, VOCABULARY)).astype(np.float32)


def case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed + 7)
    weights = np.where(draw.random(TOKENS) < 0.3, 0.0, draw.uniform(0.5, 2, TOKENS)).astype(np.float32)
    return logits(seed), logits(seed + 50), weights


def difficulty(z_q: np.ndarray, z_p: np.ndarray) -> np.ndarray:
    return exact.hellinger(reference.softmax(z_p), reference.softmax(z_q))


def middle(values: np.ndarray) -> float:
    """The lower of the two medians, which is a token's own."""
    return float(np.sort(values)[(len(values) - 1) // 2])


@pytest.mark.parametrize("seed", SEEDS)
def test_difficulty_is_the_hellinger_distance(seed: int) -> None:
    z_q, z_p, _ = case(seed)
    got = hellinger(*(torch.from_numpy(np.log(reference.softmax(z))) for z in (z_q, z_p)))
    np.testing.assert_allclose(got.numpy(), difficulty(z_q, z_p), rtol=1e-9)
    sure = torch.tensor([[0.0, -torch.inf]])
    assert hellinger(sure, sure.flip(-1)).item() == 1.0 and hellinger(sure, sure).item() == 0.0


def test_the_hardest_share_keeps_whole_tokens_and_at_least_one() -> None:
    hard = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    live = torch.tensor([True, False, True, True, True])
    for share, want in ((1.0, [0, 2, 3, 4]), (0.75, [2, 3, 4]), (0.74, [2, 3]), (0.5, [2, 3]), (0.2, [3]), (0.0, [3])):
        assert hardest(hard, live, share).nonzero()[:, 0].tolist() == want
    assert not hardest(hard, torch.zeros(5, dtype=torch.bool), 1.0).any()
    assert hardest(hard[:0], live[:0], 0.5).shape == (0,)


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_hard_tokens_are_cold_within_their_bounds_and_the_median_has_the_base(strength: float) -> None:
    hard = torch.tensor([0.0, 1e-6, 0.1, 0.2, 0.4, 1.0])
    got = idts_temperatures(hard, torch.tensor(0.2), 1.7, strength)
    assert got[3].item() == pytest.approx(1.7, rel=1e-7)
    assert (got >= 1.7 * np.exp(-strength) - 1e-6).all() and (got <= 1.7 * np.exp(strength) + 1e-6).all()
    assert (got.diff() <= 0).all() and got[0].item() == pytest.approx(1.7 * np.exp(strength), rel=1e-6)
    np.testing.assert_allclose(got[2:].numpy(), 1.7 * np.exp(-strength * np.tanh(np.log(hard[2:].numpy() / 0.2))), rtol=1e-5)
    if strength == 0.0:
        assert (got == 1.7).all()


def test_a_centre_of_no_difficulty_is_no_division_by_zero() -> None:
    got = idts_temperatures(torch.tensor([0.0, 0.3]), torch.tensor(0.0), 1.0, 0.5)
    assert got.tolist() == pytest.approx([1.0, float(np.exp(-0.5))])


@pytest.mark.parametrize("chunk_tokens", [1, 3, TOKENS])
@pytest.mark.parametrize(("share", "tau", "strength"), [(1.0, 1.0, 0.5), (0.6, 1.5, 1.0), (0.1, 1.0, 0.3)])
@pytest.mark.parametrize("seed", SEEDS)
def test_value_and_gradient_by_the_formula_under_any_chunking(
    seed: int, share: float, tau: float, strength: float, chunk_tokens: int
) -> None:
    z_q, z_p, weights = case(seed)
    hard, live = difficulty(z_q, z_p), np.flatnonzero(weights)
    count = max(1, int(share * len(live)))
    kept = np.zeros(TOKENS)
    kept[live[np.argsort(-hard[live])[:count]]] = 1.0
    warm = tau * np.exp(-strength * np.tanh(np.log(hard / middle(hard[kept > 0]))))
    value, gradient = exact.adakd(z_q.astype(np.float64), z_p.astype(np.float64), weights, kept, warm)
    scale = len(live) / count
    objective = AdaKD(keep_share=share, temperature=tau, strength=strength, divergence=ForwardKL())
    got = run(objective, z_q, Tokens(signal=dense(z_p), weights=weights), chunk_tokens)
    same(got, (scale * value, scale * gradient), rtol=1e-4)
    assert not got[1][kept == 0].any()


@pytest.mark.parametrize("kind", [AdaKD, AdaKDAbsolute])
@pytest.mark.parametrize("seed", SEEDS)
def test_all_tokens_at_one_temperature_are_the_plain_divergence(seed: int, kind: Any) -> None:
    z_q, z_p, weights = case(seed)
    ids, logprobs = reference.top(z_p, 4)
    for signal in (dense(z_p), TopK(torch.from_numpy(ids), floats(logprobs)), TopK(torch.from_numpy(ids), floats(logprobs), "renormalise")):
        tokens = Tokens(signal=signal, weights=weights)
        for tau in (1.0, 2.5):
            same(run(kind(strength=0.0, temperature=tau), z_q, tokens), run(ReverseKL(temperature=tau), z_q, tokens), rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_fixed_borders_add_up_over_any_split(seed: int) -> None:
    z_q, z_p, weights = case(seed)
    hard = difficulty(z_q, z_p)
    border = float(np.median(hard)) + 1e-3
    kept = hard >= border
    warm = np.exp(-0.5 * np.tanh(np.log(hard / 0.4)))
    objective = AdaKDAbsolute(threshold=border, centre=0.4, divergence=ForwardKL())
    assert not isinstance(objective, TwoPass)
    want = exact.adakd(z_q.astype(np.float64), z_p.astype(np.float64), weights, kept, warm)
    same(run(objective, z_q, Tokens(signal=dense(z_p), weights=weights)), want, rtol=1e-4)
    parts = [run(objective, z_q[s], Tokens(signal=dense(z_p[s]), weights=weights[s])) for s in (slice(0, 3), slice(3, None))]
    same((sum(v for v, _ in parts), np.concatenate([g for _, g in parts])), want, rtol=1e-4)
    assert kept.any() and not kept.all()


def test_statistics_of_the_micro_batch_depend_on_the_split_as_is_said() -> None:
    z_q, z_p, _ = case(0)
    together = run(AdaKD(), z_q, Tokens(signal=dense(z_p)))[0]
    apart = sum(run(AdaKD(), z_q[s], Tokens(signal=dense(z_p[s])))[0] for s in (slice(0, 3), slice(3, None)))
    assert abs(together - apart) > 1e-3


def test_temperatures_and_divergence_are_settings_that_do_not_meet() -> None:
    for kind in (AdaKD, AdaKDAbsolute):
        for divergence in (ForwardKL(temperature=2.0), {"type": "forward-kl", "temperature": {"ramp": [1, 2]}}):
            with pytest.raises(ValidationError, match="leave that at 1"):
                kind.model_validate({"divergence": divergence})
        wrapped = {"type": "selected-tokens-absolute", "divergence": {"type": "forward-kl", "temperature": 2.0}}
        with pytest.raises(ValidationError, match="leave that at 1"):
            kind.model_validate({"divergence": wrapped})
        with pytest.raises(ValidationError, match="cross-entropy reads no teacher"):
            kind.model_validate({"divergence": {"type": "cross-entropy"}})
        with pytest.raises(ValidationError, match="looks at whole micro-batches itself"):
            kind(divergence=AdaKD())
        assert kind.model_validate({"divergence": {"type": "reverse-kl"}}) == kind()


def test_what_cannot_be_tempered_is_named() -> None:
    ids, logprobs = reference.top(logits(50), 4)
    dropped = TopK(torch.from_numpy(ids), floats(logprobs), "drop")
    for kind in (AdaKD, AdaKDAbsolute):
        with pytest.raises(ValueError, match="rest is dropped cannot be tempered"):
            run(kind(), logits(0), Tokens(signal=dropped))
        with pytest.raises(ValueError, match=f"{kind().type} compares with a teacher"):
            run(kind(), logits(0), Tokens())


def test_a_divergence_that_looks_at_single_tokens_finds_them_behind_temperatures() -> None:
    ids, logprobs = reference.top(logits(50), 4)
    kept = TopK(torch.from_numpy(ids), floats(logprobs))
    tempered = TemperedPerToken(kept, torch.full((len(ids),), 2.0))
    assert tempered.ids is kept.ids and tempered.tail == "bucket" and TemperedPerToken(dense(logits(50)), torch.ones(6)).ids is None
    value, _ = run(AdaKD(divergence={"type": "atkd-absolute"}), logits(0), Tokens(signal=kept, labels=ids[:, 0]))
    assert np.isfinite(value)


@pytest.mark.parametrize("objective", [AdaKD(), AdaKD(keep_share=0.3), AdaKDAbsolute()])
def test_edges_are_quiet(objective: Any) -> None:
    z_q, z_p, _ = case(0)
    none = run(objective, z_q[:0], Tokens(signal=dense(z_p[:0])))
    assert none[0] == 0.0 and none[1].shape == (0, VOCABULARY)
    masked = run(objective, z_q, Tokens(signal=dense(z_p), weights=np.zeros(TOKENS)))
    assert masked[0] == 0.0 and not masked[1].any()
    value, gradient = run(objective, z_q, Tokens(signal=dense(z_q)))
    assert abs(value) < 2e-5 and np.abs(gradient).max() < 2e-6
    z_q[:, 2] = z_p[:, 2] = -np.inf
    value, gradient = run(objective, z_q, Tokens(signal=dense(z_p)))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[:, 2].any()


def test_settings_move_with_progress_and_stay_in_range() -> None:
    z_q, z_p, weights = case(0)
    tokens = Tokens(signal=dense(z_p), weights=weights)
    ramp = Ramp(ramp=(0.2, 1.0))
    moving: list[tuple[Any, Any]] = [
        (AdaKD(keep_share=ramp, temperature=ramp, strength=ramp), AdaKD(keep_share=0.6, temperature=0.6, strength=0.6)),
        (AdaKDAbsolute(threshold=ramp, centre=ramp), AdaKDAbsolute(threshold=0.6, centre=0.6)),
    ]
    for scheduled, still in moving:
        same(run(scheduled, z_q, tokens, progress=HALF), run(still, z_q, tokens))
    for wrong in ({"keep_share": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValidationError):
            AdaKD.model_validate(wrong)


# The controller of the kept share.

QUICK = LATF(tolerance=0.1, step=0.2, decay=0.0, warmup_updates=2, smallest=0.5)


def after(losses: list[float], rule: LATF = QUICK, state: LATFState | None = None) -> list[LATFState]:
    states = [state or LATFState()]
    for loss in losses:
        states.append(latf_update(states[-1], loss, rule))
    return states[1:]


def test_warm_up_only_averages_and_the_next_update_takes_the_reference() -> None:
    states = after([4.0, 3.0, 2.0, 2.0])
    assert [s.reference for s in states] == [None, None, 2.0, 2.0]
    assert [s.average for s in states] == [4.0, 3.0, 2.0, 2.0]
    assert {s.share for s in states} == {1.0} and states[-1].updates == 4


def test_a_falling_loss_narrows_to_the_floor_and_a_rising_one_widens_to_all() -> None:
    start = LATFState(share=0.9, average=1.0, reference=1.0, updates=10)
    falling = after([0.95, 0.85, 0.7, 0.5, 0.4], state=start)
    assert [s.share for s in falling] == pytest.approx([0.9, 0.72, 0.576, 0.5, 0.5])
    assert [s.reference for s in falling] == [1.0, 0.85, 0.7, 0.5, 0.4]
    rising = after([1.05, 1.2, 1.5, 2.0], state=replace(start, share=0.6))
    assert [s.share for s in rising] == pytest.approx([0.6, 0.72, 0.864, 1.0])
    assert [s.reference for s in rising] == [1.0, 1.2, 1.5, 2.0]


def test_the_average_is_a_moving_one_and_starts_at_the_first_loss() -> None:
    rule = LATF(decay=0.9, warmup_updates=100)
    assert [s.average for s in after([2.0, 1.0, 0.0], rule)] == pytest.approx([2.0, 1.9, 1.71])
    assert LATFState().share == 1.0 and (LATF().tolerance, LATF().step, LATF().decay, LATF().smallest) == (0.05, 0.05, 0.99, 0.1)


@pytest.mark.parametrize("wrong", [{"tolerance": 0.0}, {"step": 1.0}, {"decay": 1.0}, {"smallest": 0.0}, {"warmup_updates": -1}])
def test_rules_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LATF.model_validate(wrong)
