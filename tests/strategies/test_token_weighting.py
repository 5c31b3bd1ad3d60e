"""Which tokens teach: scores, cuts by quantile and by number, soft weights, and the divergence that is wrapped."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from strategies.core import Progress, TwoPass
from strategies.head import TokenLogits
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.token_weighting import Score, SelectedTokens, SelectedTokensAbsolute, entropy, score
from strategies.schedule import Ramp
from strategies.signals import TopK
from tests.strategies import reference
from tests.strategies import reference_weighting as exact
from tests.strategies.chunking import Tokens, dense, floats, run, same

SEEDS = range(3)
TOKENS, VOCABULARY = 9, 13
SCORES: tuple[Score, ...] = get_args(Score)
HALF = Progress(step=5, steps=10)


def logits(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """Rows from nearly uniform to nearly certain."""
    draw = np.random.default_rng(seed)
    return (draw.normal(0, 1, (tokens, VOCABULARY)) * draw.uniform(0.1, 4, (tokens, 1))).astype(np.float32)


def case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed + 7)
    weights = np.where(draw.random(TOKENS) < 0.3, 0.0, draw.uniform(0.5, 2, TOKENS)).astype(np.float32)
    return logits(seed), logits(seed + 50), weights


def weighed(z_q: np.ndarray, z_p: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Weighted forward KL and its gradient."""
    q, p = reference.softmax(z_q), reference.softmax(z_p)
    return float((weights * reference.kl(p, q)).sum()), weights[:, None] * (q - p)


@pytest.mark.parametrize("by", SCORES)
@pytest.mark.parametrize("seed", SEEDS)
def test_each_score_by_its_formula(seed: int, by: Score) -> None:
    z_q, z_p, _ = case(seed)
    got = score(by, TokenLogits(floats(z_q).requires_grad_(), torch.zeros(TOKENS, dtype=torch.int64)), dense(z_p), "test")
    assert not got.requires_grad
    np.testing.assert_allclose(got.numpy(), exact.scores(z_q, z_p)[by], rtol=1e-4, atol=1e-6)


def test_scores_of_a_top_k_teacher_are_those_of_its_outcomes_and_the_bucket_is_no_token() -> None:
    z_q, z_p = logits(0), 0.1 * logits(50)
    ids, logprobs = reference.top(z_p, 3)
    q, p = reference.paired(z_q, ids, logprobs, 1.0, "bucket")
    outputs = TokenLogits(floats(z_q), torch.zeros(TOKENS, dtype=torch.int64))
    topk = TopK(torch.from_numpy(ids), floats(logprobs))

    def measured(by: Score) -> np.ndarray:
        return score(by, outputs, topk, "test").numpy()

    np.testing.assert_allclose(measured("teacher-entropy"), exact.entropy(p), rtol=1e-4)
    np.testing.assert_allclose(measured("distance"), 0.5 * np.abs(p - q).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(measured("teacher-confidence"), p[:, 0], rtol=1e-5)
    assert (p[:, 3] > p[:, 0]).all()
    np.testing.assert_allclose(measured("student-entropy"), exact.entropy(reference.softmax(z_q)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 3, TOKENS])
@pytest.mark.parametrize("keep", ["above", "below"])
@pytest.mark.parametrize("by", SCORES)
def test_a_quantile_keeps_one_side_of_the_micro_batch_under_any_chunking(by: Score, keep: Any, chunk_tokens: int) -> None:
    z_q, z_p, weights = case(0)
    measured = exact.scores(z_q, z_p)[by]
    cut = np.quantile(measured[weights != 0], 0.4)
    kept = measured >= cut if keep == "above" else measured <= cut
    got = run(SelectedTokens(by=by, keep=keep, quantile=0.4), z_q, Tokens(signal=dense(z_p), weights=weights), chunk_tokens)
    same(got, weighed(z_q, z_p, weights * kept))
    assert 0 < kept[weights != 0].sum() < (weights != 0).sum()
    assert not got[1][weights == 0].any()


@pytest.mark.parametrize("keep", ["above", "below"])
@pytest.mark.parametrize("by", SCORES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_number_cuts_each_token_by_itself_whatever_the_split(seed: int, by: Score, keep: Any) -> None:
    z_q, z_p, weights = case(seed)
    measured = exact.scores(z_q, z_p)[by]
    threshold = float(np.median(measured)) + 1e-3
    kept = measured >= threshold if keep == "above" else measured <= threshold
    objective = SelectedTokensAbsolute(by=by, keep=keep, threshold=threshold)
    assert not isinstance(objective, TwoPass)
    want = weighed(z_q, z_p, weights * kept)
    same(run(objective, z_q, Tokens(signal=dense(z_p), weights=weights)), want)
    parts = [run(objective, z_q[s], Tokens(signal=dense(z_p[s]), weights=weights[s])) for s in (slice(0, 4), slice(4, None))]
    same((sum(v for v, _ in parts), np.concatenate([g for _, g in parts])), want)


def test_a_quantile_depends_on_how_the_step_is_split_as_is_said() -> None:
    z_q, z_p, weights = case(0)
    order = np.argsort(exact.scores(z_q, z_p)["student-entropy"])  # sure tokens in one micro-batch, unsure ones in the other
    z_q, z_p, weights = z_q[order], z_p[order], weights[order]
    objective = SelectedTokens(by="student-entropy", quantile=0.5)
    together = run(objective, z_q, Tokens(signal=dense(z_p), weights=weights))[0]
    apart = sum(run(objective, z_q[s], Tokens(signal=dense(z_p[s]), weights=weights[s]))[0] for s in (slice(0, 4), slice(4, None)))
    assert abs(together - apart) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_soft_weights_are_a_sigmoid_around_the_cut(seed: int) -> None:
    z_q, z_p, weights = case(seed)
    gap = exact.scores(z_q, z_p)["entropy-gap"]
    soft = 1 / (1 + np.exp(-gap))
    tokens = Tokens(signal=dense(z_p), weights=weights)
    same(run(SelectedTokensAbsolute(by="entropy-gap", softness=1.0), z_q, tokens), weighed(z_q, z_p, weights * soft))
    cut = np.quantile(gap[weights != 0], 0.7)
    below = 1 / (1 + np.exp(-(cut - gap) / 0.2))
    objective = SelectedTokens(by="entropy-gap", keep="below", quantile=0.7, softness=0.2)
    same(run(objective, z_q, tokens), weighed(z_q, z_p, weights * below), rtol=1e-4)


def test_equal_entropies_weigh_a_half() -> None:
    z_q = logits(0)
    z_p = z_q[:, ::-1].copy()
    same(
        run(SelectedTokensAbsolute(softness=1.0), z_q, Tokens(signal=dense(z_p))),
        weighed(z_q, z_p, np.full(TOKENS, 0.5)),
    )


@pytest.mark.parametrize("softness", [None, 0.5])
def test_a_mean_over_the_kept_tokens_divides_by_what_was_kept(softness: Any) -> None:
    z_q, z_p, weights = case(1)
    weights = (weights != 0).astype(np.float32)
    tokens = Tokens(signal=dense(z_p), weights=weights)
    settings: dict[str, Any] = {"by": "distance", "quantile": 0.6, "softness": softness}
    value, gradient = run(SelectedTokens(**settings), z_q, tokens)
    measured = exact.scores(z_q, z_p)["distance"]
    ahead = measured - np.quantile(measured[weights != 0], 0.6)
    multipliers = (ahead >= 0) if softness is None else 1 / (1 + np.exp(-ahead / softness))
    scale = weights.sum() / (multipliers * weights).sum()
    same(run(SelectedTokens(**settings, average="kept"), z_q, tokens), (value * scale, gradient * scale), rtol=1e-4)


@pytest.mark.parametrize(("keep", "quantile"), [("above", 0.0), ("below", 1.0)])
def test_a_quantile_at_the_far_end_keeps_every_token(keep: Any, quantile: float) -> None:
    z_q, z_p, weights = case(0)
    tokens = Tokens(signal=dense(z_p), weights=weights)
    same(run(SelectedTokens(keep=keep, quantile=quantile), z_q, tokens), run(ForwardKL(), z_q, tokens))


def test_any_objective_of_single_tokens_is_wrapped_with_its_own_settings() -> None:
    z_q, z_p, weights = case(0)
    labels = np.arange(TOKENS)
    tokens = Tokens(labels, dense(z_p), weights)
    kept = exact.scores(z_q, z_p)["student-entropy"] >= 1.0
    among = Tokens(labels, dense(z_p), weights * kept)
    for inner in (ForwardKL(temperature=2.0), CrossEntropy()):
        objective = SelectedTokensAbsolute(divergence=inner, by="student-entropy", threshold=1.0)
        same(run(objective, z_q, tokens), run(inner, z_q, among))


@pytest.mark.parametrize("kind", [SelectedTokens, SelectedTokensAbsolute])
def test_the_wrapped_objective_is_written_as_its_own_settings_and_comes_back_equal(kind: Any) -> None:
    given = kind.model_validate({"divergence": {"type": "forward-kl", "temperature": 2.0}})
    assert given == kind(divergence=ForwardKL(temperature=2.0))
    written = given.model_dump()
    assert written["divergence"] == {"type": "forward-kl", "temperature": 2.0, "t_scale": "auto"}
    assert kind.model_validate(written) == given == kind.model_validate_json(given.model_dump_json())
    assert hash(given) == hash(kind.model_validate(written)) and kind.model_json_schema()["properties"]["divergence"]
    ramp = kind.model_validate({"divergence": {"type": "forward-kl", "temperature": {"ramp": [1, 3]}}})
    z_q, z_p, _ = case(0)
    tokens = Tokens(signal=dense(z_p))
    same(run(ramp, z_q, tokens, progress=HALF), run(given, z_q, tokens))


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        ({"type": "no-such"}, "got the type 'no-such'; expected one of .*forward-kl"),
        ({"temperature": 2.0}, "got the type None"),
        ({"type": "forward-kl", "temprature": 2.0}, "temprature"),
        ({"type": "selected-tokens"}, "selected-tokens looks at whole micro-batches itself"),
        (SelectedTokens(), "selected-tokens looks at whole micro-batches itself"),
        *(({"type": name}, f"{name} is no sum over tokens") for name in ("sinkhorn", "hidden-states", "reverse-kl-squared")),
        (3, "instance of ObjectiveSettings"),
    ],
)
def test_what_cannot_be_wrapped_says_why(divergence: Any, message: str) -> None:
    for kind in (SelectedTokens, SelectedTokensAbsolute):
        with pytest.raises(ValidationError, match=message):
            kind.model_validate({"divergence": divergence})


@pytest.mark.parametrize("objective", [SelectedTokens(average="kept"), SelectedTokens(by="distance"), SelectedTokensAbsolute()])
def test_edges_are_quiet(objective: Any) -> None:
    z_q, z_p, _ = case(0)
    none = run(objective, z_q[:0], Tokens(signal=dense(z_p[:0])))
    assert none[0] == 0.0 and none[1].shape == (0, VOCABULARY)
    masked = run(objective, z_q, Tokens(signal=dense(z_p), weights=np.zeros(TOKENS)))
    assert masked[0] == 0.0 and not masked[1].any()
    value, gradient = run(objective, z_q, Tokens(signal=dense(z_q)))
    assert abs(value) < 1e-5 and np.abs(gradient).max() < 1e-6
    z_q[:, 2] = z_p[:, 2] = -np.inf
    value, gradient = run(objective, z_q, Tokens(signal=dense(z_p)))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[:, 2].any()


def test_a_score_of_the_teacher_needs_one_and_names_who_asked() -> None:
    for objective in (SelectedTokens(by="distance"), SelectedTokensAbsolute(by="teacher-entropy")):
        with pytest.raises(ValueError, match=f"{objective.type} compares with a teacher"):
            run(objective, logits(0), Tokens())


def test_cuts_move_with_progress() -> None:
    z_q, z_p, weights = case(0)
    tokens = Tokens(signal=dense(z_p), weights=weights)
    moving: list[tuple[Any, Any]] = [
        (SelectedTokens(quantile=Ramp(ramp=(0.0, 1.0))), SelectedTokens(quantile=0.5)),
        (SelectedTokens(softness=Ramp(ramp=(0.5, 1.5))), SelectedTokens(softness=1.0)),
        (SelectedTokensAbsolute(threshold=Ramp(ramp=(0.0, 1.0))), SelectedTokensAbsolute(threshold=0.5)),
    ]
    for scheduled, still in moving:
        same(run(scheduled, z_q, tokens, progress=HALF), run(still, z_q, tokens))
    for wrong in ({"quantile": 1.2}, {"softness": 0.0}, {"by": "loudness"}):
        with pytest.raises(ValidationError):
            SelectedTokens.model_validate(wrong)


def test_a_token_that_cannot_be_said_adds_no_entropy() -> None:
    assert entropy(torch.tensor([[0.5, 0.5, 0.0]]).log()).item() == pytest.approx(np.log(2))
