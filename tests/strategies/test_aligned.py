"""Objectives across two tokenizers against references in float64, and what they must be equal to where the tokenizers agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strategies.aligned import UNITS, UNTOLD, BoundedSpans, ForeignTopK, SpanLikelihoods, TakeBoundedSpans, TakeForeignTopK, TakeSpans
from strategies.objectives.aligned import AlignedULD, Distance, SharedTokens, SpanLikelihood, span_distance
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.transport import ULD
from strategies.signals import Dense, TopK
from tests.strategies import reference_aligned as exact
from tests.strategies.chunking import Tokens, floats, run, same

SEEDS = range(4)
TOKENS, VOCABULARY, KEPT = 11, 9, 5
SPAN = np.asarray([-1, 4, 4, 5, 6, 6, 6, -1, 9, 11, 11])
"""Numbers of aligned spans, as a micro-batch of two rows has them."""


def spans_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels, the teacher's numbers, and weights that are 0 outside spans."""
    draw = np.random.default_rng(seed)
    z_q, labels = draw.normal(0, 1.5, (TOKENS, VOCABULARY)).astype(np.float32), draw.integers(0, VOCABULARY, TOKENS)
    first = (SPAN != -1) & np.concatenate([[True], SPAN[1:] != SPAN[:-1]])
    log_p = np.where(first, -draw.exponential(2.0, TOKENS), 0.0).astype(np.float32)
    weights = np.where(SPAN == -1, 0.0, draw.uniform(0.5, 2.0, TOKENS)).astype(np.float32)
    return z_q, labels, log_p, weights


def likelihoods(log_p: np.ndarray, span: np.ndarray = SPAN) -> SpanLikelihoods:
    return SpanLikelihoods(torch.as_tensor(span), floats(log_p))


@pytest.mark.parametrize("chunk_tokens", [1, 4, TOKENS])
@pytest.mark.parametrize("distance", ["kl", "reverse-kl", "total-variation"])
@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_span_likelihoods_are_compared_as_the_formula_says(seed: int, tau: float, distance: Distance, chunk_tokens: int) -> None:
    z_q, labels, log_p, weights = spans_case(seed)
    got = run(SpanLikelihood(temperature=tau, distance=distance), z_q, Tokens(labels, likelihoods(log_p), weights), chunk_tokens)
    same(got, exact.span_likelihood(z_q, labels, SPAN, log_p, weights, tau, distance), rtol=5e-5)


BEHIND = [3, 4, 7, 9]
"""Tokens right behind a span; one of them is in no span itself."""


def bounded(log_p: np.ndarray, seed: int) -> tuple[BoundedSpans, np.ndarray]:
    """Likelihoods of spans and of units behind them, which the student's tokens 1, 4 and 6 begin."""
    begins = np.full(TOKENS, UNTOLD, np.float32)
    begins[BEHIND] = -np.random.default_rng(seed + 20).exponential(1.0, len(BEHIND))
    return BoundedSpans(torch.as_tensor(SPAN), floats(log_p), floats(begins), torch.tensor([1, 4, 6])), begins


@pytest.mark.parametrize("chunk_tokens", [1, 4, TOKENS])
@pytest.mark.parametrize("distance", ["kl", "reverse-kl", "total-variation"])
@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_likelihoods_of_spans_and_units_behind_them_are_compared_as_the_formula_says(
    seed: int, tau: float, distance: Distance, chunk_tokens: int
) -> None:
    z_q, labels, log_p, weights = spans_case(seed)
    signal, begins = bounded(log_p, seed)
    got = run(SpanLikelihood(temperature=tau, distance=distance), z_q, Tokens(labels, signal, weights), chunk_tokens)
    same(got, exact.span_likelihood(z_q, labels, SPAN, log_p, weights, tau, distance, (begins, [1, 4, 6])), rtol=5e-5)
    assert got[0] != pytest.approx(
        run(SpanLikelihood(temperature=tau, distance=distance), z_q, Tokens(labels, likelihoods(log_p), weights))[0]
    )


def test_a_unit_that_nobody_can_begin_is_impossible_and_finite() -> None:
    z_q, labels, log_p, weights = spans_case(0)
    signal, begins = bounded(log_p, 0)
    begins[BEHIND] = -np.inf
    value, gradient = run(
        SpanLikelihood(), z_q, Tokens(labels, BoundedSpans(signal.span, signal.logprobs, floats(begins), signal.own), weights)
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("distance", ["kl", "reverse-kl", "total-variation"])
def test_equal_likelihoods_are_at_distance_zero_without_a_slope(distance: Distance) -> None:
    log = torch.tensor([-1e-9, -0.3, -7.0, -900.0], dtype=torch.float64)
    value, slope = span_distance(log, log, 100.0, distance)
    assert value.tolist() == [0.0] * 4 and slope.tolist() == [0.0] * 4


def test_a_sure_or_an_impossible_span_has_finite_numbers() -> None:
    ends = torch.tensor([0.0, -torch.inf, -5.0], dtype=torch.float64)
    for log_q in ends:
        for log_p in ends:
            for distance in ("kl", "reverse-kl", "total-variation"):
                value, slope = span_distance(log_q[None], log_p[None], 1.0, distance)
                assert torch.isfinite(value).all() and torch.isfinite(slope).all(), (log_q, log_p, distance)


def test_at_a_high_temperature_the_distance_tends_to_its_limit() -> None:
    log_p, log_q = (torch.tensor(v, dtype=torch.float64) for v in ([-0.5, -3.0, -20.0], [-1.0, -2.0, -20.5]))
    a, b = -log_p, -log_q
    value, slope = span_distance(log_q, log_p, 1e6, "kl")
    torch.testing.assert_close(value, (b - a) + a * (a / b).log(), rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(slope, -1 + a / b, rtol=2e-4, atol=1e-5)


def test_where_tokens_are_spans_at_temperature_one_it_is_the_binary_kl_of_each_token() -> None:
    z_q, labels, _, weights = spans_case(0)
    log_p = -np.random.default_rng(5).exponential(1.0, TOKENS)
    got = run(SpanLikelihood(temperature=1.0), z_q, Tokens(labels, likelihoods(log_p, np.arange(TOKENS)), weights))
    log_q = torch.tensor(z_q).double().log_softmax(-1).numpy()[np.arange(TOKENS), labels]
    p, q = np.exp(log_p), np.exp(log_q)
    assert got[0] == pytest.approx(float((weights * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))).sum()), rel=1e-4)


def foreign_case(seed: int, kept: int = KEPT) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits, the student's ids of the teacher's kept tokens or -1, their falling log-probabilities, and weights."""
    draw = np.random.default_rng(seed)
    z_q = draw.normal(0, 1.5, (TOKENS, VOCABULARY)).astype(np.float32)
    ids = np.stack([draw.permutation(VOCABULARY)[:kept] for _ in range(TOKENS)])
    ids[draw.random(ids.shape) < 0.4] = -1
    log_p = np.sort(torch.tensor(draw.normal(0, 1.5, (TOKENS, kept + 3))).log_softmax(-1).numpy(), -1)[:, ::-1][:, :kept].astype(np.float32)
    return z_q, ids, log_p, np.where(draw.random(TOKENS) < 0.3, 0.0, 1.5).astype(np.float32)


def foreign(ids: np.ndarray, log_p: np.ndarray) -> ForeignTopK:
    none = torch.zeros(len(ids))
    return ForeignTopK(none.long(), none, torch.as_tensor(ids.copy()), floats(log_p.copy()))


@pytest.mark.parametrize("kept", [1, KEPT, VOCABULARY])
@pytest.mark.parametrize("without_shared", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_sorted_probabilities_are_compared_as_the_formula_says(seed: int, without_shared: bool, kept: int) -> None:
    z_q, ids, log_p, weights = foreign_case(seed, kept)
    got = run(AlignedULD(without_shared=without_shared), z_q, Tokens(None, foreign(ids, log_p), weights))
    same(got, exact.foreign_uld(z_q, ids if without_shared else np.full_like(ids, -1), log_p, weights))


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_shared_tokens_are_compared_as_the_formula_says(seed: int, beta: float) -> None:
    z_q, ids, log_p, weights = foreign_case(seed)
    got = run(SharedTokens(beta=beta), z_q, Tokens(None, foreign(ids, log_p), weights))
    same(got, exact.shared_tokens(z_q, ids, log_p, weights, beta), rtol=5e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_one_vocabulary_shared_tokens_are_a_top_k_signal_with_its_bucket(seed: int) -> None:
    z_q, _, log_p, weights = foreign_case(seed)
    ids = np.stack([np.random.default_rng(i).permutation(VOCABULARY)[:KEPT] for i in range(TOKENS)])
    got = run(SharedTokens(beta=0.0), z_q, Tokens(None, foreign(ids, log_p), weights))
    want = run(ForwardKL(), z_q, Tokens(None, TopK(torch.as_tensor(ids), floats(log_p)), weights))
    same(got, want, rtol=1e-4)
    nothing = run(AlignedULD(without_shared=True), z_q, Tokens(None, foreign(ids, log_p), weights))
    rest = np.exp(log_p.astype(np.float64)).sum(-1)
    assert nothing[0] >= 0 and (rest < 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_all_of_the_teachers_vocabulary_kept_is_the_whole_distance_and_blind_to_which_token_is_likely(seed: int) -> None:
    z_q, _, _, weights = foreign_case(seed)
    z_p = np.random.default_rng(seed + 9).normal(0, 1.5, (TOKENS, 6)).astype(np.float32)
    log_p = np.sort(torch.tensor(z_p).log_softmax(-1).numpy(), -1)[:, ::-1]
    signal = foreign(np.full(log_p.shape, -1), log_p)
    got = run(AlignedULD(), z_q, Tokens(None, signal, weights))
    whole = run(ULD(), z_q, Tokens(None, Dense(floats(np.concatenate([z_p, np.full((TOKENS, 3), -np.inf)], -1))), weights))
    same(got, whole, rtol=1e-4)
    assert run(AlignedULD(), z_q[:, ::-1].copy(), Tokens(None, signal, weights))[0] == pytest.approx(got[0], rel=1e-6)
    assert got[0] <= 2 * weights.sum()


def test_takes_read_the_columns_that_they_name() -> None:
    columns = {
        "span": torch.tensor([[3], [-1]], dtype=torch.int32),
        "logprob": torch.tensor([[-0.5], [0.0]]),
        "ids": torch.tensor([[4, -1], [-1, -1]], dtype=torch.int32),
        "logprobs": torch.tensor([[-0.1, -3.0], [0.0, 0.0]]),
    }
    spans = TakeSpans().read({n: columns[n] for n in TakeSpans.columns}, None)
    kept = TakeForeignTopK().read({n: columns[n] for n in TakeForeignTopK.columns}, None)
    assert isinstance(spans, SpanLikelihoods) and spans.span.tolist() == [3, -1] and spans.gives == {"spans"}
    assert isinstance(kept, ForeignTopK) and kept.chunk(0, 1).gives == {"spans", "foreign"}
    begins = {"begins": torch.tensor([[UNTOLD], [-0.25]]), UNITS: torch.tensor([3])}
    units = TakeBoundedSpans().read({n: {**columns, **begins}[n] for n in (*TakeBoundedSpans.columns, UNITS)}, None)
    assert isinstance(units, BoundedSpans) and units.chunk(1, 2).begins.tolist() == [-0.25] and units.own.tolist() == [3]  # type: ignore[attr-defined]
    assert (
        TakeSpans().request.kind == "per-token"
        and TakeBoundedSpans().request.kind == "among"
        and TakeForeignTopK(top_k=7).request.top_k == 7
    )
    with pytest.raises(ValueError, match="cannot give"):
        spans.label_logprobs(None)  # type: ignore[arg-type]
