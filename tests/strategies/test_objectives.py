"""What every divergence objective owes: the formula's value and gradient, zero at agreement, masks, tails, padding, limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch

from strategies.core import Progress
from strategies.head import TokenLogits
from strategies.objectives import OBJECTIVES
from strategies.objectives.base import weighted_sum
from strategies.objectives.likelihood import CrossEntropy
from strategies.signals import Dense, PerToken, Sampled, Tail, TopK
from tests.strategies import reference
from tests.strategies import reference_divergences as ref
from tests.strategies.families import CASES, IDS, NOW, Case, dense, logits, loss_and_gradient, student

SEEDS = range(3)
every = pytest.mark.parametrize("case", CASES, ids=IDS)


def only(wanted: Callable[[Case], bool]) -> pytest.MarkDecorator:
    chosen = [case for case in CASES if wanted(case)]
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


TAILS: tuple[Tail, ...] = get_args(Tail)


def expected(case: Case, z_q: np.ndarray, z_p: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    value = case.frozen(z_q, z_p, temperature)
    values = value(reference.softmax(z_q, temperature), reference.softmax(z_p, temperature))
    scale = temperature**case.objective.order
    return scale * values, scale * ref.logit_gradient(value, z_q, z_p, temperature)


def top_k(z_p: np.ndarray, k: int, tail: Tail = "bucket") -> TopK:
    ids, logprobs = reference.top(z_p, k)
    return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float(), tail)


@every
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_values_and_gradients_are_those_of_the_formula(case: Case, temperature: float) -> None:
    objective = case.objective.model_copy(update={"temperature": temperature})
    for seed in SEEDS:
        z_q, z_p = logits(seed), logits(seed + 100)
        loss, slope = loss_and_gradient(objective, z_q, dense(z_p))
        values, slopes = expected(case, z_q, z_p, temperature)
        assert loss == pytest.approx(values.sum(), rel=2e-5)
        np.testing.assert_allclose(slope, slopes, atol=2e-5 * max(1.0, np.abs(slopes).max()))


@every
def test_without_scaling_the_temperature_only_divides(case: Case) -> None:
    z_q, z_p = logits(0), logits(100)
    scaled = case.objective.model_copy(update={"temperature": 2.0})
    plain = scaled.model_copy(update={"t_scale": "none"})
    factor = 2.0**case.objective.order
    assert loss_and_gradient(scaled, z_q, dense(z_p))[0] == pytest.approx(factor * loss_and_gradient(plain, z_q, dense(z_p))[0])


@every
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(case: Case, temperature: float) -> None:
    z = logits(0)
    loss, slope = loss_and_gradient(case.objective.model_copy(update={"temperature": temperature}), z, dense(z))
    assert loss == 0.0 or not case.zero
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


@every
@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2])
def test_values_and_gradients_near_agreement_are_not_lost_to_rounding(case: Case, distance: float) -> None:
    """There a divergence is its curvature f''(1) times half the variance of `z_q - z_p` under q, to first order."""
    z_q = logits(5, (8, 2000), 4.0)
    z_p = (z_q + distance * logits(6, (8, 2000), 1.0)).astype(np.float32)
    outputs = student(z_q)
    values = case.objective.values(outputs, dense(z_p), 1.0, NOW)
    (slope,) = torch.autograd.grad(values.sum(), outputs.logits)
    if case.zero:
        wanted = case.frozen(z_q, z_p, 1.0)(reference.softmax(z_q), reference.softmax(z_p))
        assert (values >= 0).all()
        np.testing.assert_allclose(values.detach().numpy(), wanted, rtol=1e-3, atol=3e-7)
    if case.at_high_temperature is not None:
        q, apart = reference.softmax(z_q), z_q.astype(np.float64) - z_p.astype(np.float64)
        linear = case.at_high_temperature * q * (apart - (q * apart).sum(-1, keepdims=True))
        np.testing.assert_allclose(slope.numpy(), linear, atol=5e-7 + 3e-2 * np.abs(linear).max())


@only(lambda case: case.at_high_temperature is not None)
def test_at_a_very_high_temperature_logits_are_matched(case: Case) -> None:
    assert case.at_high_temperature is not None
    z_q, z_p = logits(1, size=1.0), logits(101, size=1.0)
    _, slope = loss_and_gradient(case.objective.model_copy(update={"temperature": 300.0}), z_q, dense(z_p))
    centred = [z - z.mean(-1, keepdims=True) for z in (z_q.astype(np.float64), z_p.astype(np.float64))]
    wanted = case.at_high_temperature * (centred[0] - centred[1]) / z_q.shape[-1]
    np.testing.assert_allclose(slope, wanted, atol=2e-2 * np.abs(wanted).max())


@every
def test_masked_tokens_pass_exactly_nothing_whatever_they_hold(case: Case) -> None:
    z_q, z_p = logits(0), logits(100)
    clean_loss, clean_slope = loss_and_gradient(case.objective, z_q[2:], dense(z_p[2:]))
    z_q[0, 3], z_q[0, 4], z_p[0, 4], z_p[0, 5] = -np.inf, -np.inf, -np.inf, -np.inf
    z_p[1] = np.nan
    weights = np.asarray([0, 0, 1, 1, 1, 1], dtype=np.float32)
    loss, slope = loss_and_gradient(case.objective, z_q, dense(z_p), weights)
    assert loss == pytest.approx(clean_loss, rel=1e-6)
    assert not slope[:2].any()
    np.testing.assert_allclose(slope[2:], clean_slope, atol=1e-7)


@every
def test_a_token_impossible_on_both_sides_changes_nothing(case: Case) -> None:
    z_q, z_p = logits(0), logits(100)
    wide = [np.concatenate([z, np.full((len(z), 1), -np.inf, dtype=np.float32)], -1) for z in (z_q, z_p)]
    loss, slope = loss_and_gradient(case.objective, z_q, dense(z_p))
    wide_loss, wide_slope = loss_and_gradient(case.objective, wide[0], dense(wide[1]))
    assert wide_loss == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(wide_slope[:, :-1], slope, atol=1e-6)
    assert not wide_slope[:, -1].any()


@every
def test_a_narrow_teacher_gives_no_mass_to_the_ids_it_lacks(case: Case) -> None:
    """Like a teacher whose logits there are -inf. Reverse KLs leave those ids out on both sides."""
    z_q, z_p = logits(0), logits(100)[:, :15]
    padded = np.concatenate([z_p, np.full((6, 4), -np.inf, dtype=np.float32)], -1)
    loss, slope = loss_and_gradient(case.objective, z_q, dense(z_p))
    same_loss, same_slope = loss_and_gradient(case.objective, z_q, dense(padded))
    assert loss == pytest.approx(same_loss, rel=1e-6) and np.isfinite(loss)
    np.testing.assert_allclose(slope, same_slope, atol=1e-6)
    p = reference.softmax(padded)
    if case.name == "reverse-kl":
        q = reference.softmax(z_q[:, :15])
        assert loss == pytest.approx(reference.kl(q, p[:, :15]).sum(), rel=1e-5)
        np.testing.assert_allclose(slope[:, 15:], 0.0, atol=1e-7)
    elif case.processed and case.name not in {"jeffreys", "jsd 1.0", "skew-reverse-kl 0.0"}:
        values, slopes = expected(case, z_q, padded)
        assert loss == pytest.approx(values.sum(), rel=1e-5)
        np.testing.assert_allclose(slope, slopes, atol=2e-5)


@every
def test_a_wide_teacher_is_renormalised_over_the_ids_of_the_student(case: Case) -> None:
    z_q, z_p = logits(0)[:, :15], logits(100)
    assert loss_and_gradient(case.objective, z_q, dense(z_p))[0] == loss_and_gradient(case.objective, z_q, dense(z_p[:, :15]))[0]


@every
def test_no_tokens_give_zero_and_one_token_is_enough(case: Case) -> None:
    for signal in (dense(logits(100)), top_k(logits(100), 4)):
        loss, slope = loss_and_gradient(case.objective, logits(0)[:0], signal.chunk(0, 0))
        assert loss == 0.0 and slope.shape == (0, 19)
        parts = [loss_and_gradient(case.objective, logits(0)[i : i + 1], signal.chunk(i, i + 1))[0] for i in range(6)]
        assert sum(parts) == pytest.approx(loss_and_gradient(case.objective, logits(0), signal)[0], rel=1e-5)


@every
def test_weights_multiply_tokens_and_the_result_is_a_sum(case: Case) -> None:
    z_q, z_p = logits(0), logits(100)
    weights = np.asarray([0.0, 1.0, 2.0, 0.5, 0.0, 3.0], dtype=np.float32)
    values, slopes = expected(case, z_q, z_p)
    loss, slope = loss_and_gradient(case.objective, z_q, dense(z_p), weights)
    assert loss == pytest.approx((weights * values).sum(), rel=1e-5)
    np.testing.assert_allclose(slope, weights[:, None] * slopes, atol=2e-5)


@every
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_top_k_of_the_whole_vocabulary_is_dense(case: Case, tail: Tail, temperature: float) -> None:
    z_q, z_p = logits(3), logits(103)
    objective = case.objective.model_copy(update={"temperature": temperature})
    whole, slopes = loss_and_gradient(objective, z_q, dense(z_p))
    loss, slope = loss_and_gradient(objective, z_q, top_k(z_p, 19, tail))
    assert loss == pytest.approx(whole, rel=1e-5)
    np.testing.assert_allclose(slope, slopes, atol=1e-5)


@only(lambda case: case.processed)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_a_bucket_never_exceeds_the_dense_value(case: Case, k: int) -> None:
    for seed in range(6):
        z_q, z_p = logits(seed), logits(seed + 100)
        bucketed = case.objective.values(student(z_q), top_k(z_p, k), 1.0, NOW).detach().numpy()
        whole = case.objective.values(student(z_q), dense(z_p), 1.0, NOW).detach().numpy()
        assert (bucketed <= whole * (1 + 1e-5) + 1e-5).all()


@every
def test_bfloat16_logits_are_as_good_as_their_own_rounding(case: Case) -> None:
    z_q, z_p = logits(0), logits(100)
    rounded = torch.from_numpy(z_p).bfloat16()
    loss, slope = loss_and_gradient(case.objective, z_q, Dense(rounded))
    same_loss, same_slope = loss_and_gradient(case.objective, z_q, dense(rounded.float().numpy()))
    assert loss == same_loss
    np.testing.assert_array_equal(slope, same_slope)
    values, _ = expected(case, z_q, z_p)
    assert loss == pytest.approx(values.sum(), rel=2e-2)


@every
def test_nothing_flows_into_the_teacher(case: Case) -> None:
    z_p = torch.from_numpy(logits(100)).requires_grad_()
    loss = case.objective(student(logits(0)), Dense(z_p), torch.ones(6), NOW)
    loss.backward()
    assert z_p.grad is None


@every
def test_signals_of_the_wrong_kind_are_refused_by_name(case: Case) -> None:
    kind = case.objective.type
    with pytest.raises(ValueError, match=f"{kind} .*names no signal; expected .*TopK"):
        case.objective(student(logits(0)), None, torch.ones(6), NOW)
    with pytest.raises(ValueError, match=f"{kind} cannot read the signal PerToken; expected .*Dense"):
        case.objective(student(logits(0)), PerToken(torch.zeros(6)), torch.ones(6), NOW)
    draws = Sampled(torch.zeros((6, 2), dtype=torch.int64), torch.zeros((6, 2)), torch.ones((6, 2)))
    if kind != "forward-kl":
        with pytest.raises(ValueError, match=f"{kind} cannot read the signal Sampled; expected .*Dense"):
            case.objective(student(logits(0)), draws, torch.ones(6), NOW)


def test_a_student_that_is_not_a_number_is_not_hidden() -> None:
    z_q, z_p = logits(0), logits(100)
    z_q[2] = np.nan
    for case in CASES:
        assert np.isnan(case.objective(student(z_q), dense(z_p), torch.ones(6), NOW).item()), case.name


def test_a_weighted_sum_ignores_what_weighs_nothing() -> None:
    values = torch.tensor([torch.inf, torch.nan, 2.0], requires_grad=True)
    total = weighted_sum(values, torch.tensor([0.0, 0.0, 1.5]))
    total.backward()
    assert total.item() == 3.0
    assert values.grad is not None and values.grad.tolist() == [0.0, 0.0, 1.5]


def test_the_mapping_names_every_objective_by_its_type_and_all_defaults_stand() -> None:
    for name, settings in OBJECTIVES.items():
        assert settings.model_fields["type"].default == name
        if name != "reverse-kl-k1" and not any(f.is_required() for f in settings.model_fields.values()):
            assert settings.model_validate({"type": name}) == settings()
    assert {case.objective.type for case in CASES} | {"cross-entropy"} <= set(OBJECTIVES)


def test_every_built_in_objective_has_its_row_in_the_readme() -> None:
    import strategies

    assert strategies.__file__ is not None
    with open(strategies.__file__.replace("__init__.py", "README.md"), encoding="utf-8") as readme:
        table = readme.read()
    assert [name for name in OBJECTIVES if f"`{name}`" not in table] == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_smoothed_cross_entropy_is_the_formula(seed: int, smoothing: float) -> None:
    z_q, labels = logits(seed), np.random.default_rng(seed).integers(0, 19, 6)
    outputs = student(z_q, labels)
    loss = CrossEntropy(smoothing=smoothing)(outputs, None, torch.ones(6), NOW)
    (slope,) = torch.autograd.grad(loss, outputs.logits)
    assert loss.item() == pytest.approx(ref.smoothed_cross_entropy(z_q, labels, smoothing).sum(), rel=1e-5)
    target = (1 - smoothing) * np.eye(19)[labels] + smoothing / 19
    np.testing.assert_allclose(slope.numpy(), reference.softmax(z_q) - target, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_masked_token_whose_label_is_impossible_costs_nothing(smoothing: float) -> None:
    z_q, labels = logits(0), np.zeros(6, dtype=np.int64)
    z_q[0, 0] = -np.inf
    outputs = student(z_q, labels)
    weights = torch.tensor([0.0, 1, 1, 1, 1, 1])
    loss = CrossEntropy(smoothing=smoothing)(outputs, None, weights, NOW)
    (slope,) = torch.autograd.grad(loss, outputs.logits)
    assert loss.item() == pytest.approx(ref.smoothed_cross_entropy(z_q[1:], labels[1:], smoothing).sum(), rel=1e-5)
    assert not slope[0].any() and slope.isfinite().all()


def test_scheduled_settings_move_with_progress() -> None:
    z_q, z_p = torch.from_numpy(logits(0)), dense(logits(100))
    ramped = OBJECTIVES["jsd"].model_validate({"beta": {"ramp": [0.2, 0.6]}, "temperature": {"ramp": [1.0, 3.0]}})
    fixed = OBJECTIVES["jsd"].model_validate({"beta": 0.4, "temperature": 2.0})
    halfway, outputs = Progress(step=5, steps=10), TokenLogits(z_q, torch.zeros(6, dtype=torch.int64))
    assert callable(ramped) and callable(fixed)
    assert ramped(outputs, z_p, torch.ones(6), halfway).item() == pytest.approx(fixed(outputs, z_p, torch.ones(6), NOW).item(), rel=1e-6)
