"""Preferences over pairs of rows: against float64 autograd of whole sequences, under any chunking and order of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from strategies.core import Progress
from strategies.head import TokenLogits
from strategies.objectives.preference import DPO, REDI, SimPO, pair_weights
from strategies.schedule import Ramp
from tests.strategies import reference_preference as exact
from tests.strategies.chunking import Tokens, floats, given_tokens, run, same
from tests.strategies.reference_sampled import label_logprobs

SEEDS = range(4)
VOCABULARY = 9
LENGTHS = np.asarray([3, 2, 1, 4, 5, 1])
EVERY = [DPO, SimPO, REDI]
ROWS = np.repeat(np.arange(6), LENGTHS)
COUNT = len(ROWS)


def logits(seed: int, tokens: int = COUNT) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, (tokens, VOCABULARY)).astype(np.float32)


def case(seed: int) -> tuple[np.ndarray, Tokens]:
    """Three pairs; the reference's log-probabilities are another model's."""
    draw = np.random.default_rng(seed + 10)
    labels = draw.integers(0, VOCABULARY, COUNT)
    ref = label_logprobs(logits(seed + 50), labels).astype(np.float32)
    return logits(seed), Tokens(labels, given_tokens(ref), pair_weights(LENGTHS), ROWS)


def losses(objective: Any, tokens: Tokens) -> Any:
    """The reference of `objective` with its settings."""
    if isinstance(objective, DPO):
        ref = tokens.signal.label_logprobs.double().numpy()
        return exact.dpo(float(objective.beta), ref, np.asarray(tokens.rows), objective.length_normalised)  # type: ignore[arg-type]
    if isinstance(objective, SimPO):
        return exact.simpo(float(objective.beta), float(objective.gamma))  # type: ignore[arg-type]
    return exact.redi(float(objective.alpha))


def expected(objective: Any, z: np.ndarray, tokens: Tokens, weights: dict[int, float] | None = None) -> tuple[float, np.ndarray]:
    weights = {0: 1.0, 1: 1.0, 2: 1.0} if weights is None else weights
    return exact.over_pairs(z.astype(np.float64), np.asarray(tokens.labels), np.asarray(tokens.rows), weights, losses(objective, tokens))


SETTINGS = [DPO(), DPO(beta=1.3), DPO(beta=2.0, length_normalised=True), SimPO(), SimPO(beta=0.5, gamma=-0.3), REDI(), REDI(alpha=0.3)]


@pytest.mark.parametrize("chunk_tokens", [1, 3, COUNT])
@pytest.mark.parametrize("objective", SETTINGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_value_and_gradient_are_those_of_whole_sequences(seed: int, objective: Any, chunk_tokens: int) -> None:
    z, tokens = case(seed)
    same(run(objective, z, tokens, chunk_tokens), expected(objective, z, tokens))


@pytest.mark.parametrize("objective", SETTINGS)
def test_the_order_of_tokens_and_the_numbers_of_pairs_do_not_matter(objective: Any) -> None:
    z, tokens = case(0)
    value, gradient = run(objective, z, tokens)
    order = np.random.default_rng(3).permutation(COUNT)
    mixed = Tokens(
        np.asarray(tokens.labels)[order],
        given_tokens(tokens.signal.label_logprobs.numpy()[order]),
        tokens.weights[order],
        np.asarray([0, 1, 6, 7, 40, 41])[ROWS][order],
    )
    same(run(objective, z[order], mixed), (value, gradient[order]))


@pytest.mark.parametrize("objective", SETTINGS)
def test_a_pair_weighs_what_its_one_weight_says_wherever_it_stands(objective: Any) -> None:
    z, tokens = case(1)
    weights = np.zeros(COUNT, dtype=np.float32)
    weights[[2, 11]] = 0.25, 3.0  # the last token of row 0 and the second of row 4; rows 2 and 3 are left out
    given = replace(tokens, weights=weights)
    got = run(objective, z, given)
    same(got, expected(objective, z, tokens, {0: 0.25, 2: 3.0}))
    assert not got[1][(ROWS == 2) | (ROWS == 3)].any()


@pytest.mark.parametrize("objective", SETTINGS)
def test_pairs_in_micro_batches_of_their_own_add_up_to_the_step(objective: Any) -> None:
    z, tokens = case(2)
    value, gradient = run(objective, z, tokens)
    parts = []
    for pair in range(3):
        mine = pair == ROWS // 2
        signal = given_tokens(tokens.signal.label_logprobs.numpy()[mine])
        parts.append(run(objective, z[mine], Tokens(np.asarray(tokens.labels)[mine], signal, tokens.weights[mine], ROWS[mine] % 2)))
    same((sum(v for v, _ in parts), np.concatenate([g for _, g in parts])), (value, gradient))


def test_the_weight_column_counts_pairs_so_that_dividing_by_it_gives_their_mean() -> None:
    assert np.count_nonzero(pair_weights(LENGTHS)) == 3
    assert pair_weights(LENGTHS).tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert pair_weights(np.zeros(0, dtype=np.int64)).shape == (0,)
    for wrong in ([1, 2, 3], [1, 0]):
        with pytest.raises(ValueError, match="rows in pairs, each with loss tokens"):
            pair_weights(np.asarray(wrong))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_student_equal_to_its_reference_has_log_two_and_swapping_a_pair_turns_its_gradient(seed: int, normalised: bool) -> None:
    z, tokens = case(seed)
    own = TokenLogits(floats(z), torch.as_tensor(tokens.labels)).label_logprobs().numpy()
    objective = DPO(length_normalised=normalised)
    value, gradient = run(objective, z, replace(tokens, signal=given_tokens(own)))
    assert value / 3 == pytest.approx(np.log(2), rel=1e-6)
    swapped = replace(tokens, signal=given_tokens(own), rows=ROWS ^ 1, weights=first_tokens(ROWS ^ 1))
    again, turned = run(objective, z, swapped)
    assert again == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(turned, -gradient, atol=1e-7)
    assert np.abs(gradient).max() > 1e-3


def first_tokens(rows: np.ndarray) -> np.ndarray:
    weights = np.zeros(len(rows), dtype=np.float32)
    for row in np.unique(rows[rows % 2 == 0]):
        weights[np.flatnonzero(rows == row)[0]] = 1.0
    return weights


@pytest.mark.parametrize("seed", SEEDS)
def test_redi_without_wrong_traces_is_length_normalised_sft(seed: int) -> None:
    z, tokens = case(seed)
    value, gradient = run(REDI(alpha=0.0), z, tokens)
    logprobs = label_logprobs(z, tokens.labels)
    sft = sum(-logprobs[row == ROWS].mean() for row in (0, 2, 4))
    assert value == pytest.approx(sft, rel=1e-5)
    assert not gradient[ROWS % 2 == 1].any() and gradient[ROWS % 2 == 0].any(-1).all()


def test_the_chosen_text_is_pulled_up_and_the_rejected_one_pushed_down() -> None:
    z, tokens = case(0)
    labels = np.asarray(tokens.labels)
    for objective in SETTINGS:
        _, gradient = run(objective, z, tokens)
        on_label = gradient[np.arange(COUNT), labels]
        assert (on_label[ROWS % 2 == 0] < 0).all() and (on_label[ROWS % 2 == 1] > 0).all()


def test_the_second_pass_asks_for_no_signal_where_there_is_no_reference() -> None:
    z, tokens = case(0)
    for objective in (SimPO(), REDI()):
        same(run(objective, z, replace(tokens, signal=None)), run(objective, z, tokens))
    with pytest.raises(ValueError, match="dpo reads .*label_logprobs.* got no signal"):
        run(DPO(), z, replace(tokens, signal=None))


@pytest.mark.parametrize("objective", EVERY)
def test_a_row_without_its_partner_is_named(objective: Any) -> None:
    z, tokens = case(0)
    kept = ROWS != 3
    alone = Tokens(np.asarray(tokens.labels)[kept], given_tokens(np.zeros(kept.sum())), tokens.weights[kept], ROWS[kept])
    with pytest.raises(ValueError, match="row 2 has loss tokens here, and its partner 3 has none"):
        run(objective(), z[kept], alone)
    with pytest.raises(ValueError, match="row 7 has loss tokens here, and its partner 6 has none"):
        run(objective(), z[:1], Tokens([0], given_tokens([0.0]), [0.0], [7]))
    with pytest.raises(ValueError, match="which row each of its 16 tokens is of"):
        run(objective(), z, replace(tokens, rows=None))


@pytest.mark.parametrize("objective", EVERY)
def test_weights_that_would_miscount_the_pairs_are_named(objective: Any) -> None:
    z, tokens = case(0)
    with pytest.raises(ValueError, match="rows 0 and 1 have 3 and 2 non-zero weights; expected one on the chosen row"):
        run(objective(), z, replace(tokens, weights=None))
    astray = tokens.weights.copy()
    astray[-1] = 1.0
    with pytest.raises(ValueError, match="rows 4 and 5 have 1 and 1 non-zero weights"):
        run(objective(), z, replace(tokens, weights=astray))


@pytest.mark.parametrize("objective", EVERY)
def test_no_pairs_and_pairs_of_no_weight_teach_nothing(objective: Any) -> None:
    z, tokens = case(0)
    for rows in (None, np.zeros(0, dtype=np.int64)):
        value, gradient = run(objective(), z[:0], Tokens(signal=given_tokens(np.zeros(0)), rows=rows))
        assert value == 0.0 and gradient.shape == (0, VOCABULARY)
    value, gradient = run(objective(), z, replace(tokens, weights=np.zeros(COUNT)))
    assert value == 0.0 and not gradient.any()


@pytest.mark.parametrize("objective", EVERY)
def test_vocabulary_that_nobody_can_say_does_no_harm(objective: Any) -> None:
    z, tokens = case(0)
    z[:, 5] = -np.inf
    value, gradient = run(objective(), z, replace(tokens, labels=np.where(np.asarray(tokens.labels) == 5, 4, tokens.labels)))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[:, 5].any()


def test_very_long_and_very_different_sequences_stay_finite() -> None:
    z, tokens = case(0)
    for sign in (-1, 1):
        far = given_tokens(np.where(ROWS % 2 == 0, sign * 1e4, 0.0))
        value, gradient = run(DPO(beta=1.0), z, replace(tokens, signal=far))
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_settings_move_with_progress_and_stay_in_range() -> None:
    z, tokens = case(0)
    half = Progress(step=5, steps=10)
    moving: list[tuple[Any, Any]] = [
        (DPO(beta=Ramp(ramp=(0.1, 0.3))), DPO(beta=0.2)),
        (SimPO(beta=Ramp(ramp=(1.0, 3.0)), gamma=Ramp(ramp=(0.0, 1.0))), SimPO(beta=2.0, gamma=0.5)),
        (REDI(alpha=Ramp(ramp=(0.0, 1.0))), REDI(alpha=0.5)),
    ]
    for scheduled, still in moving:
        same(run(scheduled, z, tokens, progress=half), run(still, z, tokens))
    for objective, wrong in ((DPO, {"beta": 0.0}), (SimPO, {"beta": -1.0}), (REDI, {"alpha": 1.5})):
        with pytest.raises(ValidationError):
            objective(**wrong)


@pytest.mark.parametrize("objective", EVERY)
def test_two_weights_on_a_chosen_row_are_one_too_many(objective: Any) -> None:
    z, tokens = case(0)
    twice = tokens.weights.copy()
    twice[1] = 1.0
    with pytest.raises(ValueError, match="rows 0 and 1 have 2 and 0 non-zero weights"):
        run(objective(), z, replace(tokens, weights=twice))


@pytest.mark.parametrize("objective", EVERY)
def test_what_is_settled_takes_four_bytes_a_number(objective: Any) -> None:
    _, tokens = case(0)
    batch = tokens.batch(COUNT)
    surveyed = torch.zeros(COUNT, 1)
    assert objective().settle(surveyed, batch, floats(tokens.weights), Progress(0, 10)).dtype == torch.float32
