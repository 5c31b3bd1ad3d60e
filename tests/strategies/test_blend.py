"""Several teachers made one: mixture and product, their weights, and which members go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from strategies.blend import Blend
from strategies.head import Head
from strategies.objectives.adakd import AdaKD
from strategies.objectives.atkd import ATKD, ATKDAbsolute
from strategies.objectives.divergence import ForwardKL, ReverseKL
from strategies.objectives.token_weighting import score
from strategies.signals import Dense, Hidden, PerToken, TopK
from tests.strategies import reference
from tests.strategies.chunking import Tokens, run, same
from tests.strategies.families import dense, logits, loss_and_gradient, student

TEACHERS = [logits(s) for s in (100, 200, 300)]
WEIGHTS = (0.5, 0.3, 0.2)
ROWS = np.random.default_rng(0).dirichlet(np.ones(3), 6).astype(np.float32)
"""Per-token weights `(N, K)`."""


def blend(kind: Any, weights: Sequence[float | torch.Tensor] = WEIGHTS) -> Blend:
    return Blend(tuple(dense(z) for z in TEACHERS), tuple(weights), kind)


def blended(kind: str, weights: np.ndarray, temperature: float) -> np.ndarray:
    """From probabilities, in float64; weights `(K,)` or `(N, K)`."""
    each = np.stack([reference.softmax(z, temperature) for z in TEACHERS], -1)
    shares = np.broadcast_to(weights, (6, 3))[:, None, :]
    if kind == "mixture":
        return np.asarray((each * shares).sum(-1))
    return reference.restricted(np.prod(each**shares, -1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["mixture", "product"])
def test_a_blend_is_its_formula_with_weights_for_all_tokens_or_for_each(kind: str, temperature: float) -> None:
    per_token = [torch.from_numpy(ROWS[:, k]) for k in range(3)]
    mixed = [torch.full((6,), 0.5), 0.3, 0.2]
    for weights, wanted in ((WEIGHTS, np.asarray(WEIGHTS)), (per_token, ROWS), (mixed, np.asarray(WEIGHTS))):
        signal = blend(kind, weights)
        _, log_p = signal.pair(student(logits(0)), temperature)
        np.testing.assert_allclose(log_p.exp().numpy(), blended(kind, wanted, temperature), rtol=2e-5, atol=1e-8)
        _, piece = signal.chunk(2, 4).pair(student(logits(0)[2:4]), temperature)
        torch.testing.assert_close(piece, log_p[2:4])


def test_mixture_weights_are_shares_and_product_weights_are_not() -> None:
    outputs = student(logits(0))
    torch.testing.assert_close(blend("mixture", (5, 3, 2)).pair(outputs, 1.0)[1], blend("mixture").pair(outputs, 1.0)[1])
    sharper = blend("product", (2.0, 0.0, 0.0)).pair(outputs, 1.0)[1]
    np.testing.assert_allclose(sharper.exp().numpy(), reference.softmax(2 * TEACHERS[0].astype(np.float64)), rtol=2e-5)
    past = blend("product", (2.0, -1.0, 0.0)).pair(outputs, 1.0)[1]
    np.testing.assert_allclose(past.exp().numpy(), reference.softmax(2.0 * TEACHERS[0] - TEACHERS[1]), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("kind", "objective"), [("mixture", ForwardKL()), ("product", ReverseKL())])
def test_weighted_kls_have_the_gradient_of_one_kl_to_the_blend(kind: str, objective: ForwardKL | ReverseKL) -> None:
    _, slope = loss_and_gradient(objective, logits(0), blend(kind))
    parts = [w * loss_and_gradient(objective, logits(0), dense(z))[1] for w, z in zip(WEIGHTS, TEACHERS, strict=True)]
    np.testing.assert_allclose(slope, sum(parts), atol=2e-6)


@pytest.mark.parametrize("kind", ["mixture", "product"])
def test_copies_of_one_teacher_are_that_teacher(kind: Any) -> None:
    one = dense(TEACHERS[0])
    for signal in (Blend((one, one, one), WEIGHTS, kind), Blend((one,), (1.0,), kind)):
        torch.testing.assert_close(signal.pair(student(logits(0)), 2.0), one.pair(student(logits(0)), 2.0))


@pytest.mark.parametrize("kind", ["mixture", "product"])
def test_a_member_of_weight_zero_is_not_heard_even_about_what_it_rules_out(kind: Any) -> None:
    silent = TEACHERS[1].copy()
    silent[:, 3] = -np.inf
    members = (dense(TEACHERS[0]), dense(silent))
    routed = torch.tensor([1.0, 1, 1, 0, 0, 0])
    _, log_p = Blend(members, (routed, 1 - routed), kind).pair(student(logits(0)), 1.0)
    torch.testing.assert_close(log_p[:3], members[0].teacher(19, 1.0)[:3])
    torch.testing.assert_close(log_p[3:], members[1].teacher(19, 1.0)[3:])
    _, log_p = Blend(members, (1.0, 0.0), kind).pair(student(logits(0)), 1.0)
    torch.testing.assert_close(log_p, members[0].teacher(19, 1.0))


def test_a_token_that_one_weighed_member_rules_out_is_out_of_the_product_and_in_the_mixture() -> None:
    silent = TEACHERS[1].copy()
    silent[:, 3] = -np.inf
    members = (dense(TEACHERS[0]), dense(silent))
    for weights in ((0.5, 0.5), (2.0, -1.0)):
        assert torch.isneginf(Blend(members, weights, "product").teacher(19, 1.0)[:, 3]).all()
    half = Blend(members, (0.5, 0.5)).teacher(19, 1.0)[:, 3].exp()
    np.testing.assert_allclose(half.numpy(), 0.5 * reference.softmax(TEACHERS[0])[:, 3], rtol=1e-5)


def test_hidden_dense_and_narrower_members_blend_over_the_vocabulary_of_the_student() -> None:
    draw = torch.Generator().manual_seed(0)
    head, states = Head(torch.randn(25, 4, generator=draw)), torch.randn(6, 4, generator=draw)
    signal = Blend((Hidden(states, head), dense(TEACHERS[0][:, :15])), (0.5, 0.5))
    p = reference.softmax((states @ head.weight.T).numpy()[:, :19])
    p[:, :15] += reference.softmax(TEACHERS[0][:, :15])
    np.testing.assert_allclose(signal.pair(student(logits(0)), 1.0)[1].exp().numpy(), p / 2, rtol=2e-5)


def top_k(z_p: np.ndarray, ids: np.ndarray, tail: Any = "bucket") -> TopK:
    logprobs = np.log(np.take_along_axis(reference.softmax(z_p), ids, -1))
    return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float(), tail)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
def test_top_k_members_on_the_same_tokens_blend_outcome_by_outcome(tail: Any) -> None:
    ids, _ = reference.top(TEACHERS[0], 5)
    members = tuple(top_k(z, ids, tail) for z in TEACHERS)
    signal = Blend(members, WEIGHTS)
    log_q, log_p = signal.pair(student(logits(0)), 1.0)
    torch.testing.assert_close(log_q, members[0].pair(student(logits(0)), 1.0)[0])
    wanted = sum(w * m.teacher(19, 1.0).exp() for w, m in zip(WEIGHTS, members, strict=True))
    torch.testing.assert_close(log_p.exp(), wanted)
    assert signal.whole == (tail != "drop") and "label" not in signal.gives and "label" in blend("mixture").gives


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, -0.5), (0.5, 0.5)])
def test_the_bucket_of_a_product_is_that_of_all_its_tokens(weights: tuple[float, float]) -> None:
    """As if each member spread its own rest evenly over them."""
    ids, _ = reference.top(TEACHERS[0], 5)
    members = [top_k(z, ids) for z in TEACHERS[:2]]
    kept, rest = (np.stack([m.teacher(19, 1.0).exp().double().numpy()[:, part] for m in members]) for part in (slice(5), slice(5, 6)))
    whole = np.concatenate([kept, np.repeat(rest / 14, 14, -1)], -1)
    product = np.prod(whole ** np.asarray(weights)[:, None, None], 0)
    wanted = product / product.sum(-1, keepdims=True)
    _, log_p = Blend(tuple(members), weights, "product").pair(student(logits(0)), 1.0)
    np.testing.assert_allclose(log_p.exp().numpy(), np.concatenate([wanted[:, :5], wanted[:, 5:].sum(-1, keepdims=True)], -1), rtol=1e-5)


@pytest.mark.parametrize("objective", [AdaKD(strength=1.0), AdaKD(temperature=2.0), ATKD(), ATKDAbsolute()])
def test_objectives_that_tell_tokens_from_the_bucket_do_so_in_a_blend(objective: Any) -> None:
    ids, _ = reference.top(TEACHERS[0], 5)
    one = top_k(TEACHERS[0], ids)
    blended, alone = (run(objective, logits(0), Tokens(signal=s, labels=ids[:, 0])) for s in (Blend((one, one), (0.5, 0.5)), one))
    same(blended, alone)


def test_the_bucket_of_a_blend_is_no_token_to_be_sure_of() -> None:
    ids = np.tile(np.arange(3), (6, 1))
    members = tuple(top_k(np.zeros((6, 19), np.float32), ids) for _ in range(2))
    sure = score("teacher-confidence", student(logits(0)), Blend(members, (0.5, 0.5)), "test")
    np.testing.assert_allclose(sure.numpy(), 1 / 19, rtol=1e-5)


def test_a_blend_whose_rest_is_dropped_cannot_be_tempered_per_token_either() -> None:
    ids, _ = reference.top(TEACHERS[0], 5)
    signal = Blend(tuple(top_k(z, ids, "drop") for z in TEACHERS), WEIGHTS)
    with pytest.raises(ValueError, match="rest is dropped cannot be tempered"):
        run(AdaKD(), logits(0), Tokens(signal=signal))


def test_first_choices_and_kept_mass_are_those_of_the_blend() -> None:
    ids, _ = reference.top(TEACHERS[0], 5)
    outputs, p = student(logits(0)), blended("mixture", np.asarray(WEIGHTS), 1.0)
    signal = Blend(tuple(top_k(z, ids) for z in TEACHERS), WEIGHTS)
    kept = np.take_along_axis(p, ids, -1)
    np.testing.assert_array_equal(signal.first(outputs, 3).numpy(), np.take_along_axis(ids, np.argsort(-kept, -1), -1)[:, :3])
    assert signal.first(outputs, 9).shape == (6, 5)
    np.testing.assert_allclose(signal.kept_mass(outputs)[1].numpy(), kept.sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(blend("mixture").first(outputs, 4).numpy(), np.argsort(-p, -1)[:, :4])
    assert blend("product").kept_mass(outputs)[1].tolist() == [1.0] * 6


IDS = np.tile(np.arange(3), (6, 1))


@pytest.mark.parametrize(
    ("members", "weights", "message"),
    [
        ((), (), "0 members and 0 weights"),
        ((dense(TEACHERS[0]),), (0.5, 0.5), "1 members and 2 weights"),
        ((dense(TEACHERS[0]), PerToken(torch.zeros(6))), (0.5, 0.5), "Dense, PerToken; expected distributions"),
        ((dense(TEACHERS[0]), top_k(TEACHERS[1], IDS)), (0.5, 0.5), "Dense, TopK; expected all TopK or none"),
        ((top_k(TEACHERS[0], IDS), top_k(TEACHERS[1], IDS + 1)), (0.5, 0.5), "different ids"),
        ((top_k(TEACHERS[0], IDS), top_k(TEACHERS[1], IDS[:, :2])), (0.5, 0.5), "different ids"),
        ((top_k(TEACHERS[0], IDS), top_k(TEACHERS[1], IDS, "drop")), (0.5, 0.5), "tails bucket, drop"),
        ((dense(TEACHERS[0]), dense(TEACHERS[1])), (1.5, -0.5), "expected shares"),
        ((dense(TEACHERS[0]), dense(TEACHERS[1])), (0.0, 0.0), "expected shares"),
    ],
)
def test_members_that_do_not_go_together_are_refused(members: tuple[Dense, ...], weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blend(members, weights)
