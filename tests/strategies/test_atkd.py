"""ATKD: the split of a divergence at the given token, who is easy, and the means of both groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from strategies.core import Progress, TwoPass
from strategies.head import TokenLogits
from strategies.objectives.atkd import ATKD, ATKDAbsolute, Direction, dkd_parts, label_column, uncertainty
from strategies.objectives.divergence import forward_kl, reverse_kl
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


def case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed + 7)
    weights = np.where(draw.random(TOKENS) < 0.3, 0.0, draw.uniform(0.5, 2, TOKENS)).astype(np.float32)
    return logits(seed), logits(seed + 50), draw.integers(0, VOCABULARY, TOKENS), weights


def logs(z: np.ndarray) -> Tensor:
    return torch.from_numpy(np.log(reference.softmax(z)))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("seed", SEEDS)
def test_both_parts_by_their_formula_add_up_to_the_divergence_exactly(seed: int, direction: Direction) -> None:
    z_q, z_p, labels, _ = case(seed)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    first, second = (p, q) if direction == "forward" else (q, p)
    got = dkd_parts(logs(z_q), logs(z_p), torch.from_numpy(labels), direction)
    for mine, want in zip(got, exact.dkd(first, second, labels), strict=True):
        np.testing.assert_allclose(mine.numpy(), want, rtol=1e-6)  # 1 - p cancels in the reference
    tckd, nckd = got
    whole = (forward_kl if direction == "forward" else reverse_kl)(logs(z_q), logs(z_p))
    np.testing.assert_allclose((tckd.numpy() + (1 - first[np.arange(TOKENS), labels]) * nckd.numpy()), whole.numpy(), rtol=1e-9)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradients_of_both_parts_are_those_of_finite_differences(direction: Direction) -> None:
    z = torch.from_numpy(logits(0, 3)).double().requires_grad_()
    column = torch.tensor([0, 4, VOCABULARY])
    assert torch.autograd.gradcheck(lambda z: dkd_parts(z.log_softmax(-1), logs(logits(50, 3)), column, direction), (z,))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_certain_teacher_or_student_and_impossible_tokens_stay_finite(direction: Direction) -> None:
    certain, open_ = [0.0, -torch.inf, -torch.inf], [0.3, -0.2, -torch.inf]
    for z_q, z_p in ((certain, certain), (open_, open_), (open_, certain), (certain, open_)):
        z = torch.tensor([z_q, z_q], requires_grad=True)
        tckd, nckd = dkd_parts(z.log_softmax(-1), torch.tensor([z_p, z_p]).log_softmax(-1), torch.tensor([0, 2]), direction)
        if z_q == certain and z_p == open_ and direction == "forward":  # mass where the student has none
            assert tckd[0] == torch.inf and nckd[1] == torch.inf
            continue
        if z_q == open_ and z_p == certain and direction == "reverse":  # what a divergence makes of that is its own affair
            assert not tckd.isnan().any() and not nckd.isnan().any()
            continue
        (gradient,) = torch.autograd.grad((tckd + nckd).sum(), z)
        assert tckd.isfinite().all() and nckd.isfinite().all() and gradient.isfinite().all()
        if z_q == z_p:
            assert tckd.abs().max() < 1e-6 and nckd.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def group_by_hand(z_p: np.ndarray, labels: np.ndarray, weights: np.ndarray, quantile: float) -> np.ndarray:
    u = 1 - reference.softmax(z_p)[np.arange(TOKENS), labels]
    return np.asarray(u < np.quantile(u[weights != 0], quantile))


@pytest.mark.parametrize("chunk_tokens", [1, 3, TOKENS])
@pytest.mark.parametrize(("share", "quantile"), [(0.2, 0.5), (0.5, 0.3), (0.0, 0.5), (1.0, 0.5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_value_and_gradient_by_the_formula_under_any_chunking(seed: int, share: float, quantile: float, chunk_tokens: int) -> None:
    z_q, z_p, labels, weights = case(seed)
    easy = group_by_hand(z_p, labels, weights, quantile)
    got = run(ATKD(easy_weight=share, quantile=quantile), z_q, Tokens(labels, dense(z_p), weights), chunk_tokens)
    assert got[0] == pytest.approx(exact.atkd(z_q, z_p, labels, weights, easy, share), rel=2e-5, abs=1e-6)
    live = weights != 0
    counts = {True: (live & easy).sum(), False: (live & ~easy).sum()}

    def whole(z: Tensor) -> Tensor:
        log_q, log_p, at = z.log_softmax(-1), logs(z_p), torch.from_numpy(labels)[:, None]
        divergence = forward_kl(log_q, log_p)
        p_y, q_y = log_p.gather(1, at)[:, 0].exp(), log_q.gather(1, at)[:, 0].exp()
        tckd = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
        nckd = (divergence - tckd) / (1 - p_y)
        total = torch.zeros((), dtype=torch.float64)
        for t in np.flatnonzero(live):
            value = share * nckd[t] if easy[t] else (1 - share) * (tckd[t] + nckd[t])
            total = total + float(weights[t]) * int(live.sum()) / int(counts[bool(easy[t])]) * value
        return total

    same(got, exact.by_autograd(whole, z_q), rtol=1e-4)
    assert not got[1][weights == 0].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_with_roles_swapped_it_is_the_reverse_divergence_and_the_student_s_own_doubt(seed: int) -> None:
    z_q, z_p, labels, weights = case(seed)
    easy = group_by_hand(z_q, labels, weights, 0.5)
    value, _ = run(ATKD(direction="reverse"), z_q, Tokens(labels, dense(z_p), weights))
    assert value == pytest.approx(exact.atkd(z_p, z_q, labels, weights, easy, 0.2), rel=5e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fixed_border_adds_up_over_any_split_and_equals_the_quantile_where_half_are_easy(seed: int) -> None:
    z_q, z_p, labels, _ = case(seed)
    z_q, z_p, labels = z_q[:8], z_p[:8], labels[:8]
    u = 1 - reference.softmax(z_p)[np.arange(8), labels]
    border = float(np.quantile(u, 0.5))
    objective = ATKDAbsolute(threshold=border)
    assert not isinstance(objective, TwoPass)
    want = run(ATKD(), z_q, Tokens(labels, dense(z_p)))
    same(run(objective, z_q, Tokens(labels, dense(z_p))), want)
    parts = [run(objective, z_q[s], Tokens(labels[s], dense(z_p[s]))) for s in (slice(0, 3), slice(3, None))]
    same((sum(v for v, _ in parts), np.concatenate([g for _, g in parts])), want)


def test_a_quantile_depends_on_the_split_as_is_said() -> None:
    z_q, z_p, labels, _ = case(0)
    together = run(ATKD(), z_q, Tokens(labels, dense(z_p)))[0]
    apart = sum(run(ATKD(), z_q[s], Tokens(labels[s], dense(z_p[s])))[0] for s in (slice(0, 3), slice(3, None)))
    assert abs(together - apart) > 1e-2


def test_a_group_without_tokens_adds_nothing() -> None:
    z_q, z_p, labels, weights = case(0)
    none_easy = run(ATKD(quantile=0.0, easy_weight=0.3), z_q, Tokens(labels, dense(z_p), weights))
    assert none_easy[0] == pytest.approx(exact.atkd(z_q, z_p, labels, weights, np.zeros(TOKENS, dtype=bool), 0.3), rel=2e-5)
    one = run(ATKD(), z_q[:1], Tokens(labels[:1], dense(z_p[:1])))
    assert np.isfinite(one[0]) and np.isfinite(one[1]).all()


def test_a_top_k_teacher_holds_the_label_in_its_list_or_in_its_bucket() -> None:
    z_p = logits(50)
    ids, logprobs = reference.top(z_p, 4)
    topk = TopK(torch.from_numpy(ids), floats(logprobs))
    labels = torch.from_numpy(np.where(np.arange(TOKENS) % 2, ids[:, 2], np.argsort(z_p, -1)[:, 0]))
    assert label_column(topk, labels, 5, VOCABULARY).tolist() == [2 if t % 2 else 4 for t in range(TOKENS)]
    assert label_column(topk, labels, 4, VOCABULARY).tolist() == [2 if t % 2 else 4 for t in range(TOKENS)]  # 4 of 4: none
    z_q = logits(0)
    q, p = reference.paired(z_q, ids, logprobs, 1.0, "bucket")
    at = label_column(topk, labels, 5, VOCABULARY).numpy()
    tckd, nckd = exact.dkd(p, q, at)
    got = run(ATKDAbsolute(threshold=0.0, easy_weight=0.0), z_q, Tokens(labels.numpy(), topk))
    assert got[0] == pytest.approx(2 * (tckd + nckd).sum(), rel=5e-5)
    u = uncertainty(TokenLogits(floats(z_q), labels), topk, "forward").numpy()
    want = 1 - np.where(np.arange(TOKENS) % 2, p[:, 2], np.minimum(p[:, 3], p[:, 4]))
    np.testing.assert_allclose(u, want, rtol=1e-5)


def test_a_top_k_of_the_whole_vocabulary_is_the_dense_teacher() -> None:
    z_q, z_p, labels, weights = case(1)
    ids, logprobs = reference.top(z_p, VOCABULARY)
    topk = TopK(torch.from_numpy(ids), floats(logprobs))
    for objective in (ATKD(), ATKD(direction="reverse"), ATKDAbsolute()):
        same(run(objective, z_q, Tokens(labels, topk, weights)), run(objective, z_q, Tokens(labels, dense(z_p), weights)), rtol=1e-4)


def test_a_label_outside_a_renormalised_list_leaves_the_whole_divergence_to_the_others() -> None:
    z_q, z_p = logits(0, 3), logits(50, 3)
    ids, logprobs = reference.top(z_p, 4)
    topk = TopK(torch.from_numpy(ids), floats(logprobs), "renormalise")
    labels = np.argsort(z_p, -1)[:, 0]
    q, p = reference.paired(z_q, ids, logprobs, 1.0, "renormalise")
    got = run(ATKDAbsolute(threshold=1.0, easy_weight=0.5), z_q, Tokens(labels, topk))
    assert got[0] == pytest.approx(reference.kl(p, q).sum(), rel=5e-5)


def test_outcomes_of_unknown_identity_are_refused() -> None:
    with pytest.raises(ValueError, match="Dense gives 5 outcomes of 11 tokens and does not say which"):
        label_column(dense(logits(0)), torch.zeros(TOKENS, dtype=torch.int64), 5, VOCABULARY)
    for objective in (ATKD(), ATKDAbsolute()):
        with pytest.raises(ValueError, match=f"{objective.type} compares with a teacher"):
            run(objective, logits(0), Tokens())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", [ATKD, ATKDAbsolute])
def test_edges_are_quiet(kind: Any, direction: Direction) -> None:
    z_q, z_p, labels, _ = case(0)
    objective = kind(direction=direction)
    none = run(objective, z_q[:0], Tokens(signal=dense(z_p[:0])))
    assert none[0] == 0.0 and none[1].shape == (0, VOCABULARY)
    masked = run(objective, z_q, Tokens(labels, dense(z_p), np.zeros(TOKENS)))
    assert masked[0] == 0.0 and not masked[1].any()
    value, gradient = run(objective, z_q, Tokens(labels, dense(z_q)))
    assert abs(value) < 1e-5 and np.abs(gradient).max() < 2e-6
    z_q[:, 2] = z_p[:, 2] = -np.inf
    value, gradient = run(objective, z_q, Tokens(np.where(labels == 2, 3, labels), dense(z_p)))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[:, 2].any()
    value, gradient = run(objective, z_q, Tokens(np.full(TOKENS, 2), dense(z_p)))  # a label that nobody can say
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_token_of_no_weight_does_no_harm_where_its_divergence_is_infinite() -> None:
    z_q, z_p, _, _ = case(0)
    weights = np.asarray([0.0] + [1.0] * (TOKENS - 1))
    z_q[:, 2], z_p[1:, 2] = -np.inf, -np.inf  # only the first token's teacher can say 2
    for kind in (ATKD, ATKDAbsolute):
        for label in (2, 3):
            value, gradient = run(kind(), z_q, Tokens(np.where(np.arange(TOKENS) == 0, label, 4), dense(z_p), weights))
            assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[0].any()


def test_settings_move_with_progress_and_stay_in_range() -> None:
    z_q, z_p, labels, weights = case(0)
    tokens = Tokens(labels, dense(z_p), weights)
    ramp = Ramp(ramp=(0.2, 0.6))
    same(run(ATKD(easy_weight=ramp, quantile=ramp), z_q, tokens, progress=HALF), run(ATKD(easy_weight=0.4, quantile=0.4), z_q, tokens))
    same(
        run(ATKDAbsolute(easy_weight=ramp, threshold=ramp), z_q, tokens, progress=HALF),
        run(ATKDAbsolute(easy_weight=0.4, threshold=0.4), z_q, tokens),
    )
    with pytest.raises(ValidationError, match="from 0 to 1"):
        ATKD(easy_weight=1.2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fixed_border_with_roles_swapped_reads_the_students_own_doubt(seed: int) -> None:
    z_q, z_p, labels, _ = case(seed)
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    tckd, nckd = exact.dkd(q, p, labels)
    u = 1 - q[np.arange(TOKENS), labels]
    border = float(np.quantile(u, 0.4))
    easy = u < border
    want = (2 * np.where(easy, 0.2 * nckd, 0.8 * (tckd + nckd))).sum()
    got = run(ATKDAbsolute(direction="reverse", threshold=border), z_q, Tokens(labels, dense(z_p)))
    assert got[0] == pytest.approx(want, rel=5e-5)


def test_a_label_outside_a_renormalised_list_is_as_uncertain_as_can_be() -> None:
    ids = torch.tensor([[4], [4]])
    only = TopK(ids, torch.zeros(2, 1), "renormalise")
    outputs = TokenLogits(floats(logits(0, 2)), torch.tensor([4, 5]))
    assert uncertainty(outputs, only, "forward").tolist() == [0.0, 1.0]


def test_groups_of_one_token_each_are_means_over_one() -> None:
    z_q, z_p, labels = logits(3, 2), logits(53, 2), np.asarray([1, 2])
    u = 1 - reference.softmax(z_p)[np.arange(2), labels]
    want = exact.atkd(z_q, z_p, labels, np.ones(2), u == u.min(), 0.2)
    assert run(ATKD(), z_q, Tokens(labels, dense(z_p)))[0] == pytest.approx(want, rel=5e-5)
