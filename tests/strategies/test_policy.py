"""The policy gradient: each method that its settings make against that method's own formula, and exact expectations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from strategies.acted import Acted
from strategies.core import Progress, TwoPass
from strategies.objectives.policy import PolicyGradient, anchored, extrapolated, ratio_surrogate
from strategies.objectives.sampled import clipped_surrogate, importance
from strategies.policy import GOPD, OPD
from strategies.schedule import Ramp
from tests.strategies import reference
from tests.strategies import reference_policy as exact
from tests.strategies.chunking import Tokens, floats, given_tokens, run, same
from tests.strategies.reference_sampled import label_logprobs, reverse_kl_gradient

SEEDS = range(4)
VOCABULARY, TOKENS = 7, 12
CLIP = (0.2, 0.3)


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32)


def every_token(objective: Any, z_q: np.ndarray, weights: np.ndarray | None = None, **columns: Any) -> tuple[float, np.ndarray]:
    """Expected value and gradient `(V,)` over y ~ q, or over the given weights; columns are `(V,)`, `behaviour` that of q unless given."""
    labels, z = np.arange(VOCABULARY), np.tile(z_q, (VOCABULARY, 1))
    columns = {"behaviour": np.log(reference.softmax(z_q)), **columns}
    signal = Acted(**{name: floats(values) for name, values in columns.items()})
    value, gradient = run(objective, z, Tokens(labels, signal, reference.softmax(z_q) if weights is None else weights))
    return value, gradient.astype(np.float64).sum(0)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(reference.softmax(z)))


def case(seed: int) -> tuple[np.ndarray, Tokens, dict[str, torch.Tensor]]:
    """Logits, tokens with weights and every column, and the columns in float64. Half the ratios leave the clip range."""
    draw = np.random.default_rng(seed + 20)
    z_q, labels = logits(seed, TOKENS, VOCABULARY), draw.integers(0, VOCABULARY, TOKENS)
    signal = Acted(
        behaviour=floats(label_logprobs(z_q, labels) + draw.normal(0, 0.4, TOKENS)),
        teacher=floats(-draw.exponential(2, TOKENS)),
        reference=floats(-draw.exponential(2, TOKENS)),
        advantage=floats(draw.normal(0, 1, TOKENS)),
        reward=floats(draw.integers(0, 5, TOKENS) / 4),
        group_failed=floats(draw.integers(0, 2, TOKENS)),
    )
    weights = np.where(draw.random(TOKENS) < 0.2, 0.0, draw.uniform(0.5, 2, TOKENS)).astype(np.float32)
    return z_q, Tokens(labels, signal, weights), {name: column.double() for name, column in vars(signal).items()}


def methods(c: dict[str, torch.Tensor]) -> list[tuple[PolicyGradient, exact.Loss]]:
    """Settings beside the formula of the method that they are."""
    old, p, b, a = c["behaviour"], c["teacher"], c["reference"], c["advantage"]
    grpo = exact.grpo(old, a, *CLIP)
    rl: dict[str, Any] = {"outcome_weight": 1.0, "clip_ratio": CLIP}

    def bounded(log_q: torch.Tensor) -> torch.Tensor:
        return (p - log_q).clamp(-0.5, 0.5)

    def cut_square(log_q: torch.Tensor) -> torch.Tensor:
        d = bounded(log_q.detach())
        return grpo(log_q) + 0.3 * (0.5 * d**2 - d * (log_q - log_q.detach()))

    def stale(log_q: torch.Tensor) -> torch.Tensor:
        weight = torch.clip(torch.exp(log_q.detach()) / torch.exp(old), max=1.1)
        return weight * (exact.reinforce(lambda _: 0.7 * a)(log_q) + 0.3 * 0.5 * (log_q - p) ** 2)

    return [
        (PolicyGradient(), exact.reinforce(lambda log_q: p - log_q)),
        (PolicyGradient(clip_advantage=0.5), exact.reinforce(bounded)),
        (PolicyGradient(extrapolation=1.25), exact.reinforce(exact.gopd_advantage(p, b, 1.25))),
        (PolicyGradient(extrapolation=0.6, clip_ratio=CLIP), exact.grpo(old, exact.gopd_advantage(p, b, 0.6)(old), *CLIP)),
        (PolicyGradient(clip_ratio=CLIP), exact.grpo(old, p - old, *CLIP)),
        (PolicyGradient(outcome_weight=0.7, teacher_weight=0.3), exact.reinforce(lambda log_q: 0.7 * a + 0.3 * (p - log_q))),
        (PolicyGradient(teacher_weight=0.0, **rl), grpo),
        (PolicyGradient(teacher_weight=0.3, **rl), exact.grpo(old, a + 0.3 * (p - old), *CLIP)),
        (PolicyGradient(teacher_weight=0.3, teacher_form="squared", **rl), exact.kdrl(grpo, p, 0.3)),
        (PolicyGradient(teacher_weight=0.3, teacher_form="squared", teacher_mask="wrong", **rl), exact.kdrl(grpo, p, 0.3, 1 - c["reward"])),
        (
            PolicyGradient(teacher_weight=0.3, teacher_form="squared", teacher_mask="failed-group", **rl),
            exact.kdrl(grpo, p, 0.3, c["group_failed"]),
        ),
        (PolicyGradient(teacher_weight=0.3, teacher_form="squared", clip_advantage=0.5, **rl), cut_square),
        (PolicyGradient(teacher_weight=0.3, teacher_mask="wrong", **rl), exact.grpo(old, a + 0.3 * (1 - c["reward"]) * (p - old), *CLIP)),
        (PolicyGradient(teacher_weight=0.0, ratio_anchor=0.6, **rl), exact.rlad(old, p, a, 0.6, *CLIP)),
        (PolicyGradient(teacher_weight=0.0, ratio_anchor=0.0, **rl), exact.rlad(old, p, a, 0.0, *CLIP)),
        (PolicyGradient(outcome_weight=0.7, teacher_weight=0.3, teacher_form="squared", importance_cap=1.1), stale),
    ]


@pytest.mark.parametrize("chunk_tokens", [1, 5, TOKENS])
@pytest.mark.parametrize("number", range(16))
@pytest.mark.parametrize("seed", SEEDS)
def test_each_method_by_its_own_formula_under_any_chunking(seed: int, number: int, chunk_tokens: int) -> None:
    z_q, tokens, columns = case(seed)
    objective, loss = methods(columns)[number]
    same(run(objective, z_q, tokens, chunk_tokens), exact.over_tokens(loss, z_q, tokens.labels, tokens.weights))


def test_the_cases_have_tokens_on_both_sides_of_every_limit() -> None:
    cases = [case(seed) for seed in SEEDS]
    assert len(methods(cases[0][2])) == 16
    ratio = np.concatenate([np.exp(label_logprobs(z, t.labels) - c["behaviour"].numpy())[t.weights != 0] for z, t, c in cases])
    for beyond in (ratio > 1 + CLIP[1], ratio < 1 - CLIP[0], (ratio > 1 - CLIP[0]) & (ratio < 1 + CLIP[1])):
        assert beyond.sum() > 5


@pytest.mark.parametrize("settings", [{}, {"clip_ratio": CLIP}, {"teacher_form": "squared"}])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_teacher_alone_has_the_gradient_of_the_reverse_kl_in_expectation(seed: int, settings: dict[str, Any]) -> None:
    z_q, z_p = logits(seed, VOCABULARY), logits(seed + 50, VOCABULARY)
    value, gradient = every_token(PolicyGradient(teacher_weight=0.3, **settings), z_q, teacher=log_softmax(z_p))
    np.testing.assert_allclose(gradient, 0.3 * reverse_kl_gradient(z_q[None], z_p[None])[0], atol=2e-6)
    if not settings:
        assert value == pytest.approx(0.3 * float(reference.kl(reference.softmax(z_q), reference.softmax(z_p))), rel=1e-4)


@pytest.mark.parametrize("form", ["advantage", "squared"])
@pytest.mark.parametrize("share", [0.5, 1.25, 1.6])
@pytest.mark.parametrize("seed", SEEDS)
def test_extrapolation_distils_from_the_extrapolated_teacher(seed: int, share: float, form: str) -> None:
    z_q, z_p, z_b = (logits(seed + i, VOCABULARY) for i in (0, 50, 90))
    objective = PolicyGradient(extrapolation=share, teacher_form=form)
    _, gradient = every_token(objective, z_q, teacher=log_softmax(z_p), reference=log_softmax(z_b))
    target = np.log(exact.extrapolated_target(z_p, z_b, share))
    np.testing.assert_allclose(gradient, reverse_kl_gradient(z_q[None], target[None])[0], atol=4e-6)


def test_no_extrapolation_ignores_the_reference() -> None:
    z_q, tokens, _ = case(0)
    for other in (None, floats(np.full(TOKENS, np.nan))):
        same(
            run(PolicyGradient(), z_q, replace(tokens, signal=replace(tokens.signal, reference=other))), run(PolicyGradient(), z_q, tokens)
        )


def test_a_token_that_teacher_and_reference_rule_out_stays_ruled_out() -> None:
    never, half = torch.tensor([-torch.inf]), torch.tensor([-0.5])
    for share in (0.5, 1.5):
        assert extrapolated(never, never, share).item() == -torch.inf
        assert extrapolated(never, half, share).item() == -torch.inf
    assert extrapolated(half, never, 0.5).item() == -torch.inf and extrapolated(half, never, 1.5).item() == torch.inf


@pytest.mark.parametrize("seed", SEEDS)
def test_all_equal_outcomes_leave_distillation_and_no_teacher_leaves_the_verifier(seed: int) -> None:
    z_q, tokens, _ = case(seed)
    level = replace(tokens, signal=replace(tokens.signal, advantage=torch.zeros(TOKENS)))
    rl: dict[str, Any] = {"clip_ratio": CLIP, "outcome_weight": 1.0}
    same(run(PolicyGradient(**rl), z_q, level), run(PolicyGradient(clip_ratio=CLIP), z_q, tokens))
    alone = replace(tokens, signal=Acted(tokens.signal.behaviour, advantage=tokens.signal.advantage))
    same(run(PolicyGradient(teacher_weight=0.0, **rl), z_q, alone), run(PolicyGradient(teacher_weight=0.0, **rl), z_q, tokens))


def test_both_forms_of_the_teacher_s_part_are_the_same_where_the_writer_is_the_student() -> None:
    z_q, tokens, _ = case(1)
    fresh = replace(tokens, signal=replace(tokens.signal, behaviour=floats(label_logprobs(z_q, tokens.labels))))
    rl: dict[str, Any] = {"clip_ratio": CLIP, "outcome_weight": 1.0, "teacher_weight": 0.4}
    inside, beside = (run(PolicyGradient(**rl, teacher_form=form), z_q, fresh)[1] for form in ("advantage", "squared"))
    np.testing.assert_allclose(inside, beside, atol=1e-5)


def test_the_anchor_s_ends_are_the_writer_and_the_teacher() -> None:
    old, p = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -torch.inf])
    assert anchored(old, p, 1.0).tolist() == old.tolist() and anchored(old, p, 0.0).tolist() == p.tolist()
    assert anchored(old, p, 0.75)[0].item() == -1.5


def test_the_ratio_without_a_limit_has_the_value_1_and_the_plain_gradient() -> None:
    log_q, gains = torch.tensor([-1.0, -30.0], requires_grad=True), torch.tensor([2.0, -3.0], requires_grad=True)
    loss = ratio_surrogate(log_q, log_q, gains)
    loss.sum().backward()
    assert loss.tolist() == [-2.0, 3.0] and log_q.grad is not None and log_q.grad.tolist() == [-2.0, 3.0] and gains.grad is None


@pytest.mark.parametrize("seed", SEEDS)
def test_importance_weights_correct_for_weights_that_wrote_the_text_unless_they_are_cut(seed: int) -> None:
    z_q, z_p, z_old = (logits(seed + i, VOCABULARY) for i in (0, 50, 90))
    old, columns = reference.softmax(z_old), {"behaviour": log_softmax(z_old), "teacher": log_softmax(z_p)}
    want = reverse_kl_gradient(z_q[None], z_p[None])[0]
    _, corrected = every_token(PolicyGradient(importance_cap=1e6), z_q, old, **columns)
    np.testing.assert_allclose(corrected, want, atol=5e-6)
    for other in (PolicyGradient(), PolicyGradient(importance_cap=1.0)):
        assert np.abs(every_token(other, z_q, old, **columns)[1] - want).max() > 0.01


def test_importance_weights_are_ratios_below_a_cap_and_carry_no_gradient() -> None:
    log_q = torch.log(torch.tensor([0.2, 0.9, 0.5])).requires_grad_()
    found = importance(log_q, torch.log(torch.tensor([0.4, 0.1, 1e-30])), 2.0)
    np.testing.assert_allclose(found.numpy(), [0.5, 2.0, 2.0], rtol=1e-6)
    assert not found.requires_grad
    assert importance(log_q, torch.full((3,), -torch.inf), 2.0).tolist() == [2.0] * 3


def test_after_the_switch_only_the_verifier_teaches_and_before_it_only_the_teacher() -> None:
    z_q, tokens, _ = case(2)
    switched = PolicyGradient(outcome_weight=1.0, teacher_weight=1.0, switch_after=0.4)
    no_teacher = replace(tokens, signal=replace(tokens.signal, teacher=None))
    no_verifier = replace(tokens, signal=replace(tokens.signal, advantage=None))
    for step in (0, 3):
        same(run(switched, z_q, no_verifier, progress=Progress(step, 10)), run(PolicyGradient(), z_q, tokens))
    for step in (4, 9):
        want = run(PolicyGradient(outcome_weight=1.0, teacher_weight=0.0), z_q, tokens)
        same(run(switched, z_q, no_teacher, progress=Progress(step, 10)), want)


def test_weights_and_limits_move_with_progress() -> None:
    z_q, tokens, _ = case(3)
    half = Progress(step=5, steps=10)
    moving = PolicyGradient(
        outcome_weight=Ramp(ramp=(0.0, 2.0)),
        teacher_weight=Ramp(ramp=(1.0, 0.0)),
        extrapolation=Ramp(ramp=(1.0, 1.5)),
        clip_advantage=Ramp(ramp=(0.5, 1.5)),
    )
    fixed = PolicyGradient(outcome_weight=1.0, teacher_weight=0.5, extrapolation=1.25, clip_advantage=1.0)
    same(run(moving, z_q, tokens, progress=half), run(fixed, z_q, tokens))
    same(run(moving, z_q, tokens), run(PolicyGradient(clip_advantage=0.5), z_q, tokens))


@pytest.mark.parametrize("number", range(16))
def test_a_token_of_no_weight_teaches_nothing_whatever_stands_there(number: int) -> None:
    z_q, tokens, columns = case(0)
    dead = torch.from_numpy(tokens.weights == 0)
    assert dead.any()
    objective, _ = methods(columns)[number]
    for bad in (torch.nan, -torch.inf):
        broken = Acted(**{name: torch.where(dead, bad, column) for name, column in vars(tokens.signal).items()})
        got = run(objective, z_q, replace(tokens, signal=broken))
        same(got, run(objective, z_q, tokens))
        assert not got[1][dead.numpy()].any()


@pytest.mark.parametrize("form", ["advantage", "squared"])
def test_a_text_that_the_teacher_is_not_asked_about_may_be_one_it_rules_out(form: str) -> None:
    z_q, tokens, _ = case(0)
    never = replace(tokens, signal=replace(tokens.signal, teacher=torch.full((TOKENS,), -torch.inf), group_failed=torch.zeros(TOKENS)))
    objective = PolicyGradient(outcome_weight=1.0, teacher_mask="failed-group", teacher_form=form)
    same(run(objective, z_q, never), run(PolicyGradient(outcome_weight=1.0, teacher_weight=0.0), z_q, tokens))


@pytest.mark.parametrize("settings", [{}, {"teacher_form": "squared"}, {"clip_ratio": CLIP}])
def test_a_limit_keeps_a_ruled_out_token_finite_and_pushes_it_down(settings: dict[str, Any]) -> None:
    z_q = logits(0, 1, VOCABULARY)
    signal = Acted(floats(label_logprobs(z_q, [2])), teacher=torch.tensor([-torch.inf]))
    _, gradient = run(PolicyGradient(clip_advantage=5.0, **settings), z_q, Tokens([2], signal))
    assert np.isfinite(gradient).all() and gradient[0, 2] > 0


def test_a_ratio_to_nothing_is_held_and_passes_no_gradient() -> None:
    for gain in (1.0, -1.0, 0.0):
        log_q = torch.zeros(1, requires_grad=True)
        clipped_surrogate(log_q, torch.tensor([-torch.inf]), torch.tensor([gain])).sum().backward()
        assert log_q.grad is not None and log_q.grad.tolist() == [0.0]


def test_no_tokens_are_a_sum_of_nothing() -> None:
    value, gradient = run(PolicyGradient(), np.zeros((0, VOCABULARY)), Tokens(signal=Acted(torch.zeros(0), torch.zeros(0))))
    assert value == 0.0 and gradient.shape == (0, VOCABULARY)


def test_it_adds_up_over_tokens_in_one_pass() -> None:
    z_q, tokens, columns = case(1)
    for objective, _ in methods(columns):
        assert not isinstance(objective, TwoPass)
        cuts = ((0, 5), (5, TOKENS))
        parts = [
            run(objective, z_q[a:b], Tokens(tokens.labels[a:b], tokens.signal.chunk(a, b), tokens.weights[a:b]), chunk_tokens=4)
            for a, b in cuts
        ]
        same((sum(v for v, _ in parts), np.concatenate([g for _, g in parts])), run(objective, z_q, tokens))


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, "teacher"),
        ({"outcome_weight": 1.0, "teacher_weight": 0.0}, "advantage"),
        ({"extrapolation": 1.25}, "reference"),
        ({"teacher_mask": "wrong"}, "reward"),
        ({"teacher_mask": "failed-group"}, "group_failed"),
        ({"teacher_weight": 0.0, "ratio_anchor": 0.5, "clip_ratio": CLIP}, "teacher"),
    ],
)
def test_a_column_that_a_setting_needs_and_nobody_measured_is_named(settings: dict[str, Any], missing: str) -> None:
    z_q, tokens, _ = case(0)
    run(PolicyGradient(**settings), z_q, tokens)
    with pytest.raises(ValueError, match=f"policy-gradient reads '{missing}' of written tokens"):
        run(PolicyGradient(**settings), z_q, replace(tokens, signal=replace(tokens.signal, **{missing: None})))


@pytest.mark.parametrize(("strategy", "cap"), [(OPD(), 2.0), (GOPD(), 5.0), (OPD(importance_cap=None), None)])
def test_stale_text_is_corrected_unless_told_otherwise(strategy: OPD, cap: float | None) -> None:
    (term,) = strategy.build().updates[0].terms
    assert isinstance(term.objective, PolicyGradient) and term.objective.importance_cap == cap


def test_another_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="policy-gradient cannot read the signal GivenTokens"):
        run(PolicyGradient(), logits(0, 2, VOCABULARY), Tokens([0, 1], given_tokens([-1.0, -1.0])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio_anchor": 0.5}, "expected clip_ratio"),
        ({"clip_ratio": CLIP, "importance_cap": 2.0}, "got both"),
        ({"clip_ratio": (1.2, 0.2)}, "less than or equal to 1"),
        ({"clip_ratio": (0.2, 0.0)}, "greater than 0"),
        ({"clip_advantage": 0.0}, "above 0"),
        ({"extrapolation": 0.0}, "above 0"),
        ({"switch_after": 1.0}, "less than 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PolicyGradient(**settings)
