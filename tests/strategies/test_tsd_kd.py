"""TSD-KD: rankings of the student's own candidates, openers of a text, doubt, and the weight of the direct term."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from strategies.blend import Blend
from strategies.core import Progress
from strategies.objectives.mixtures import JSD
from strategies.objectives.token_weighting import SelectedTokensAbsolute
from strategies.objectives.tsd_kd import Entropy, PlackettLuce, openers, plackett_luce, row_quantiles
from strategies.schedule import Ramp
from strategies.signals import Dense, PerToken, TopK
from tests.strategies import reference
from tests.strategies import reference_tsd as exact
from tests.strategies.chunking import Tokens, floats, run, same
from tests.strategies.reference_weighting import by_autograd, entropy

SEEDS = range(4)
TOKENS, VOCABULARY = 14, 13


def logits(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """Rows from nearly uniform to nearly certain."""
    draw = np.random.default_rng(seed)
    return (draw.normal(0, 1, (tokens, VOCABULARY)) * draw.uniform(0.3, 4, (tokens, 1))).astype(np.float32)


def case(seed: int) -> tuple[np.ndarray, np.ndarray, Tokens]:
    """Student, teacher, and interleaved rows of tokens, some without weight."""
    draw, z_p = np.random.default_rng(seed + 9), logits(seed + 50)
    weights = np.where(draw.random(TOKENS) < 0.3, 0.0, draw.uniform(0.5, 2, TOKENS)).astype(np.float32)
    return logits(seed), z_p, Tokens(signal=Dense(floats(z_p)), weights=weights, rows=draw.integers(0, 3, TOKENS))


@pytest.mark.parametrize("seed", SEEDS)
def test_probabilities_of_all_orders_sum_to_one_and_peak_at_the_order_of_the_scores(seed: int) -> None:
    scores = np.random.default_rng(seed).normal(0, 1.5, 4)
    orders = [list(o) for o in permutations(range(4))]
    found = np.exp(-plackett_luce(torch.from_numpy(scores[orders])).numpy())
    np.testing.assert_allclose(found, [exact.order_probability(scores[o]) for o in orders], rtol=1e-12)
    assert found.sum() == pytest.approx(1.0)
    assert orders[int(found.argmax())] == np.argsort(-scores).tolist()


def test_what_cannot_be_drawn_costs_nothing_at_the_end() -> None:
    scores = torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf]], requires_grad=True)
    loss = plackett_luce(scores)
    (gradient,) = torch.autograd.grad(2.0 * loss.sum(), scores)
    assert loss.item() == pytest.approx(-np.log(exact.order_probability([1.0, 0.5])))
    assert gradient.isfinite().all() and gradient[0, 2:].tolist() == [0.0, 0.0]


def test_openers_reach_the_share_and_go_no_further() -> None:
    doubts, rows = torch.tensor([1.0, 4.0, 1.0, 4.0, 8.0, 2.0]), torch.tensor([0, 7, 0, 7, 0, 7])
    assert openers(doubts, rows, 0.1).tolist() == [True, True, False, False, False, False]
    assert openers(doubts, rows, 0.15).tolist() == [True, True, True, False, False, False]
    assert openers(doubts, rows, 0.5).tolist() == [True, True, True, True, True, False]
    assert openers(doubts, rows, 1.0).all() and not openers(doubts, rows, 0.0).any()
    assert not openers(torch.zeros(6), rows, 0.5).any()


@pytest.mark.parametrize("chunk_tokens", [1, 5, TOKENS])
@pytest.mark.parametrize(("candidates", "share"), [(10, 0.1), (3, 0.4), (50, 0.3)])
@pytest.mark.parametrize("seed", SEEDS)
def test_rankings_by_their_formula_on_the_openers_under_any_chunking(seed: int, candidates: int, share: float, chunk_tokens: int) -> None:
    z_q, z_p, tokens = case(seed)
    opening = exact.opening(np.where(tokens.weights != 0, entropy(reference.softmax(z_q)), 0.0), tokens.rows, share)
    by = tokens.weights * opening

    def loss(z: torch.Tensor) -> torch.Tensor:
        return sum((by[t] * exact.ranking_loss(z[t], z_p[t], candidates) for t in np.flatnonzero(by)), z.sum() * 0)

    got = run(PlackettLuce(candidates=candidates, entropy_share=share), z_q, tokens, chunk_tokens)
    same(got, by_autograd(loss, z_q))
    assert 0 < np.count_nonzero(by) < np.count_nonzero(tokens.weights)


def test_only_what_the_student_proposes_is_touched_and_the_teacher_s_favourite_of_it_rises() -> None:
    z_q, z_p = logits(1, 1), logits(51, 1)
    tokens = Tokens(signal=Dense(floats(z_p)), rows=[0])
    _, gradient = run(PlackettLuce(candidates=4), z_q, tokens)
    proposed = np.argsort(-z_q[0])[:4]
    assert set(np.flatnonzero(gradient[0])) == set(proposed)
    assert gradient[0, proposed[np.argmax(z_p[0, proposed])]] < 0


def test_scale_and_temperature_of_the_teacher_do_not_matter_but_its_order_does() -> None:
    z_q, z_p, tokens = case(0)
    ranked = run(PlackettLuce(), z_q, tokens)
    same(run(PlackettLuce(), z_q, replace(tokens, signal=Dense(floats(3 * z_p)))), ranked)
    assert run(PlackettLuce(), z_q, replace(tokens, signal=Dense(floats(-z_p))))[0] != pytest.approx(ranked[0], rel=0.05)


def test_a_teacher_that_cannot_choose_keeps_the_student_s_order() -> None:
    z_q, _, tokens = case(0)
    kept = run(PlackettLuce(), z_q, replace(tokens, signal=Dense(floats(z_q))))
    same(run(PlackettLuce(), z_q, replace(tokens, signal=Dense(torch.zeros(TOKENS, VOCABULARY)))), kept)
    none_of_them = np.where(np.arange(VOCABULARY) == z_q.argmin(-1)[:, None], 0.0, -np.inf)
    same(run(PlackettLuce(), z_q, replace(tokens, signal=Dense(floats(none_of_them)))), kept)


def test_vocabulary_that_nobody_can_say_does_no_harm() -> None:
    z_q, z_p, tokens = case(0)
    z_q[:, 5] = -np.inf
    z_p[:, 5] = 9.0
    for objective in (PlackettLuce(candidates=VOCABULARY), Entropy(quantile=0.0)):
        doubled = replace(tokens, signal=Dense(floats(z_p)), weights=2 * tokens.weights)
        value, gradient = run(objective, z_q, doubled)
        without = replace(doubled, signal=Dense(floats(np.delete(z_p, 5, -1))))
        same((value, np.delete(gradient, 5, -1)), run(objective, np.delete(z_q, 5, -1), without))
        assert not gradient[:, 5].any()


@pytest.mark.parametrize("chunk_tokens", [1, 5, TOKENS])
@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_entropy_by_its_formula_on_the_doubtful_tokens_of_each_row_under_any_chunking(
    seed: int, quantile: float, chunk_tokens: int
) -> None:
    z_q, _, tokens = case(seed)
    kept = exact.doubtful(z_q, tokens.rows, tokens.weights != 0, quantile)
    by = tokens.weights * kept
    want = (by * entropy(reference.softmax(z_q))).sum(), by[:, None] * exact.entropy_gradient(z_q)
    same(run(Entropy(quantile=quantile), z_q, replace(tokens, signal=None), chunk_tokens), want)


def test_a_quantile_of_a_row_is_that_of_its_live_tokens() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 9, 30):
        values, rows, live = draw.normal(0, 1, count), draw.integers(0, 4, count), draw.random(count) < 0.6
        dirty = torch.from_numpy(np.where(live, values, np.nan))
        got = row_quantiles(dirty, torch.from_numpy(rows), torch.from_numpy(live), 0.3).numpy()
        for row in np.unique(rows):
            here = live & (rows == row)
            want = np.quantile(values[here], 0.3) if here.any() else np.inf
            np.testing.assert_allclose(got[rows == row], want, rtol=1e-12)


@pytest.mark.parametrize("objective", [PlackettLuce(entropy_share=0.4), Entropy(quantile=0.4)])
def test_nothing_depends_on_which_rows_come_together(objective: Any) -> None:
    z_q, z_p, tokens = case(2)
    whole = run(objective, z_q, tokens)
    value, gradient = 0.0, np.zeros_like(z_q)
    for row in range(3):
        here = tokens.rows == row
        part = Tokens(signal=Dense(floats(z_p[here])), weights=tokens.weights[here], rows=np.zeros(here.sum(), dtype=np.int64))
        alone, gradient[here] = run(objective, z_q[here], part)
        value += alone
    same((value, gradient), whole)


@pytest.mark.parametrize("objective", [PlackettLuce(), Entropy()])
def test_no_tokens_are_a_sum_of_nothing(objective: Any) -> None:
    value, gradient = run(objective, np.zeros((0, VOCABULARY)), Tokens(signal=Dense(torch.zeros(0, VOCABULARY))))
    assert value == 0.0 and gradient.shape == (0, VOCABULARY)


def test_less_entropy_is_a_lower_loss() -> None:
    z_q, _, tokens = case(0)
    value, gradient = run(Entropy(), z_q, tokens)
    assert run(Entropy(), z_q - 0.05 * gradient, tokens)[0] < value


def test_the_direct_term_weighs_a_token_one_half_where_both_are_equally_sure() -> None:
    z_q = logits(0)
    z_p = np.roll(z_q, 1, axis=-1)
    divergence = JSD(beta=0.9, rescale=False)
    tokens = Tokens(signal=Dense(floats(z_p)))
    value, gradient = run(divergence, z_q, tokens)
    got = run(SelectedTokensAbsolute(divergence=divergence, by="entropy-gap", softness=1.0), z_q, tokens)
    same(got, (0.5 * value, 0.5 * gradient))


def test_a_blend_of_whole_distributions_ranks_too() -> None:
    z_q, z_p, tokens = case(0)
    blend = Blend((Dense(floats(z_p)), Dense(floats(z_p))), (0.5, 0.5))
    same(run(PlackettLuce(), z_q, replace(tokens, signal=blend)), run(PlackettLuce(), z_q, tokens))


def test_signals_that_do_not_know_every_token_are_refused() -> None:
    z_q, z_p, tokens = case(0)
    ids, logprobs = reference.top(z_p, 5)
    with pytest.raises(ValueError, match="plackett-luce cannot read the signal TopK"):
        run(PlackettLuce(), z_q, replace(tokens, signal=TopK(torch.from_numpy(ids), floats(logprobs))))
    with pytest.raises(ValueError, match="plackett-luce cannot read the signal PerToken; expected whole distributions"):
        run(PlackettLuce(), z_q, replace(tokens, signal=PerToken(torch.zeros(TOKENS))))


@pytest.mark.parametrize("objective", [PlackettLuce(), Entropy()])
def test_whole_texts_need_to_know_their_rows(objective: Any) -> None:
    z_q, _, tokens = case(0)
    with pytest.raises(ValueError, match=f"which row each of its {TOKENS} tokens is of"):
        run(objective, z_q, replace(tokens, rows=None))


def test_shares_move_with_progress_and_stay_shares() -> None:
    z_q, _, tokens = case(3)
    half = Progress(step=5, steps=10)
    same(
        run(PlackettLuce(entropy_share=Ramp(ramp=(0.0, 0.6))), z_q, tokens, progress=half),
        run(PlackettLuce(entropy_share=0.3), z_q, tokens),
    )
    same(run(Entropy(quantile=Ramp(ramp=(0.0, 0.8))), z_q, tokens, progress=half), run(Entropy(quantile=0.4), z_q, tokens))
    for settings in ({"entropy_share": 1.1}, {"candidates": 0}):
        with pytest.raises(ValidationError):
            PlackettLuce.model_validate(settings)
    with pytest.raises(ValidationError, match="from 0 to 1"):
        Entropy(quantile=-0.1)
