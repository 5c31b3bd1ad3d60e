"""Signals: what each treatment of a tail means, that nothing is lost when nothing is cut, and who refuses what."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch

from strategies.head import Head, TokenLogits
from strategies.objectives.divergence import ForwardKL, forward_kl, reverse_kl
from strategies.signals import Dense, Hidden, PerToken, Sampled, Signal, Tail, TopK, given
from tests.strategies import reference
from tests.strategies.families import NOW

SEEDS = range(4)
TOKENS, VOCABULARY = 7, 23
TAILS: tuple[Tail, ...] = get_args(Tail)
TEMPERATURES = [0.7, 1.0, 2.0, 5.0]


def logits(seed: int, size: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, (TOKENS, VOCABULARY)).astype(np.float32)


def teacher(z_p: np.ndarray, k: int, tail: Tail = "bucket") -> TopK:
    ids, logprobs = reference.top(z_p, k)
    return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float(), tail)


def student(z_q: np.ndarray) -> TokenLogits:
    return TokenLogits(torch.from_numpy(z_q.copy()).requires_grad_(), torch.zeros(len(z_q), dtype=torch.int64))


def pair(z_q: np.ndarray, z_p: np.ndarray, k: int, tail: Tail, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    log_q, log_p = teacher(z_p, k, tail).pair(student(z_q), temperature)
    return log_q.detach().numpy(), log_p.numpy()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1, VOCABULARY])
def test_both_sides_of_every_tail_match_the_formulas(k: int, tail: Tail, temperature: float) -> None:
    for seed in SEEDS:
        z_q, z_p = logits(seed), logits(seed + 100)
        q, p = reference.paired(z_q, *reference.top(z_p, k), temperature, tail)
        log_q, log_p = pair(z_q, z_p, k, tail, temperature)
        np.testing.assert_allclose(np.exp(log_q), q, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(np.exp(log_p), p, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("direction", [forward_kl, reverse_kl])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", TAILS)
def test_a_top_k_of_the_whole_vocabulary_is_the_dense_divergence(tail: Tail, temperature: float, direction: object) -> None:
    assert callable(direction)
    for seed in SEEDS:
        z_q, z_p = logits(seed), logits(seed + 100)
        q, p = reference.softmax(z_q, temperature), reference.softmax(z_p, temperature)
        expected = reference.kl(p, q) if direction is forward_kl else reference.kl(q, p)
        log_q, log_p = teacher(z_p, VOCABULARY, tail).pair(student(z_q), temperature)
        np.testing.assert_allclose(direction(log_q, log_p).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 12, VOCABULARY - 1])
def test_the_bucket_never_exceeds_the_dense_divergence(k: int) -> None:
    for seed in range(10):
        z_q, z_p = logits(seed), logits(seed + 100)
        p, q = reference.softmax(z_p), reference.softmax(z_q)
        log_q, log_p = (torch.from_numpy(x) for x in pair(z_q, z_p, k, "bucket", 1.0))
        assert (forward_kl(log_q, log_p).numpy() <= reference.kl(p, q) + 1e-5).all()
        assert (reverse_kl(log_q, log_p).numpy() <= reference.kl(q, p) + 1e-3).all()  # 1 - sum of float32 log-probabilities


def test_more_teacher_tokens_bring_the_bucket_closer_to_the_dense_divergence() -> None:
    z_q, z_p = logits(0), logits(100)
    pairs = [pair(z_q, z_p, k, "bucket", 1.0) for k in (1, 2, 5, 12, VOCABULARY)]
    values = [forward_kl(torch.from_numpy(q), torch.from_numpy(p)).sum().item() for q, p in pairs]
    assert all(a <= b + 1e-5 for a, b in pairwise(values))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_tempered_bucket_is_exact_for_a_uniform_tail(temperature: float) -> None:
    k, z_p = 6, logits(3)
    z_p[:, k:] = -4.0  # ids k.. share one logit, below those of the first k
    z_p[:, :k] = np.abs(z_p[:, :k])
    ids, _ = reference.top(z_p, k)
    dense = reference.softmax(z_p, temperature)
    expected = np.concatenate([np.take_along_axis(dense, ids, -1), dense[:, k:].sum(-1, keepdims=True)], -1)
    _, log_p = pair(logits(4), z_p, k, "bucket", temperature)
    np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-4)


@pytest.mark.parametrize("tail", TAILS)
def test_the_tail_treatment_is_continuous_at_temperature_one(tail: Tail) -> None:
    z_q, z_p = logits(0), logits(100)
    for at_one, near_one in zip(pair(z_q, z_p, 4, tail, 1.0), pair(z_q, z_p, 4, tail, 1.0001), strict=True):
        np.testing.assert_allclose(np.exp(at_one), np.exp(near_one), atol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bucket_gradient_matches_the_hand_derived_one(seed: int) -> None:
    z_q, z_p = logits(seed), logits(seed + 100)
    for k, temperature in ((1, 1.0), (5, 1.0), (5, 2.0), (VOCABULARY, 2.0)):
        outputs = student(z_q)
        loss = forward_kl(*teacher(z_p, k).pair(outputs, temperature)).sum()
        (gradient,) = torch.autograd.grad(loss, outputs.logits)
        expected = reference.bucket_kl_gradient(z_q, *reference.top(z_p, k), temperature)
        np.testing.assert_allclose(gradient.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("direction", [forward_kl, reverse_kl])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(tail: Tail, direction: object) -> None:
    assert callable(direction)
    for seed in SEEDS:
        z = logits(seed)
        outputs = student(z)
        values = direction(*teacher(z, 5, tail).pair(outputs, 1.0))
        (gradient,) = torch.autograd.grad(values.sum(), outputs.logits)
        np.testing.assert_allclose(values.detach().numpy(), 0.0, atol=1e-6)
        np.testing.assert_allclose(gradient.numpy(), 0.0, atol=1e-6)


def test_dropping_the_tail_may_go_below_zero_and_inflates_the_teacher() -> None:
    z_p = logits(100)
    ids, logprobs = reference.top(z_p, 3)
    p = np.exp(logprobs)
    z_q = np.full_like(z_p, -30.0)
    np.put_along_axis(z_q, ids, np.log(p / p.sum(-1, keepdims=True)).astype(np.float32), -1)
    outputs = student(z_q)
    values = ForwardKL().values(outputs, teacher(z_p, 3, "drop"), 1.0, NOW)
    (gradient,) = torch.autograd.grad(values.sum(), outputs.logits)
    assert (values < 0).all()
    np.testing.assert_allclose(gradient.numpy(), 0.0, atol=1e-6)


def test_renormalising_leaves_student_mass_outside_the_kept_tokens_free() -> None:
    z_q, z_p = logits(0), logits(100)
    outputs = student(z_q)
    (gradient,) = torch.autograd.grad(forward_kl(*teacher(z_p, 5, "renormalise").pair(outputs, 1.0)).sum(), outputs.logits)
    outside = np.ones_like(z_q, dtype=bool)
    np.put_along_axis(outside, reference.top(z_p, 5)[0], False, -1)
    np.testing.assert_allclose(gradient.numpy()[outside], 0.0, atol=1e-7)
    assert np.abs(gradient.numpy()[~outside]).max() > 1e-2


def test_a_tiny_student_tail_is_not_lost_to_cancellation() -> None:
    z_q = np.zeros((1, VOCABULARY), dtype=np.float32)
    z_q[0, 0] = 25.0  # the other tokens share about 3e-10 of the mass
    log_q, _ = pair(z_q, z_q, 1, "bucket", 1.0)
    expected = np.log(reference.student_bucket(z_q, np.zeros((1, 1), dtype=np.int64), 1.0))
    np.testing.assert_allclose(log_q[0, 1], expected[0, 1], rtol=1e-5)


@pytest.mark.parametrize("direction", [forward_kl, reverse_kl])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_teacher_without_any_tail_keeps_the_loss_finite(temperature: float, direction: object) -> None:
    assert callable(direction)
    certain = TopK(torch.tensor([[3, 1]]), torch.tensor([[0.0, -200.0]]))
    outputs = student(logits(0)[:1])
    loss = direction(*certain.pair(outputs, temperature)).sum()
    (gradient,) = torch.autograd.grad(loss, outputs.logits)
    assert loss.isfinite() and gradient.isfinite().all()


def test_top_k_is_cut_by_tokens() -> None:
    whole = teacher(logits(100), 4, "renormalise")
    piece = whole.chunk(2, 5)
    assert piece.tail == "renormalise"
    assert torch.equal(piece.ids, whole.ids[2:5]) and torch.equal(piece.logprobs, whole.logprobs[2:5])


def test_a_dense_teacher_is_its_tempered_softmax_and_log_probabilities_do_as_well() -> None:
    z_q, z_p = logits(0), logits(100)
    for temperature in TEMPERATURES:
        for given_logits in (torch.from_numpy(z_p), torch.from_numpy(z_p).log_softmax(-1)):
            log_q, log_p = Dense(given_logits).pair(student(z_q), temperature)
            np.testing.assert_allclose(log_q.exp().detach().numpy(), reference.softmax(z_q, temperature), rtol=1e-5)
            np.testing.assert_allclose(log_p.exp().numpy(), reference.softmax(z_p, temperature), rtol=2e-5)


def test_ids_beyond_the_shorter_vocabulary_are_impossible_for_a_narrow_teacher_and_dropped_from_a_wide_one() -> None:
    z_p = logits(100)
    _, narrow = Dense(torch.from_numpy(z_p[:, :20])).pair(student(logits(0)), 2.0)
    assert torch.isneginf(narrow[:, 20:]).all()
    np.testing.assert_allclose(narrow[:, :20].exp().numpy(), reference.softmax(z_p[:, :20], 2.0), rtol=1e-5)
    outputs = student(logits(0)[:, :20])
    _, wide = Dense(torch.from_numpy(z_p)).pair(outputs, 2.0)
    np.testing.assert_allclose(wide.exp().numpy(), reference.softmax(z_p[:, :20], 2.0), rtol=1e-5)
    z_p[:, 22] = 50.0  # an id that the student lacks
    assert Dense(torch.from_numpy(z_p)).first(outputs, 30).max() < 20


def test_an_average_under_the_teacher_weighs_by_its_probabilities_and_never_by_impossible_ones() -> None:
    z_p = logits(100)
    z_p[:, 3] = -np.inf
    for signal in (Dense(torch.from_numpy(z_p)), teacher(z_p, 5), teacher(z_p, 5, "renormalise"), teacher(z_p, 5, "drop")):
        weights, log_q, log_p = signal.expect(student(logits(0)), 2.0)
        paired_q, paired_p = signal.pair(student(logits(0)), 2.0)
        assert torch.equal(log_q, paired_q) and torch.equal(log_p, paired_p)
        assert torch.equal(weights, log_p.exp()) and weights.isfinite().all()
        assert signal.whole == bool(torch.allclose(weights.sum(-1), torch.ones(TOKENS)))


WIDTH = 6


def hidden_teacher(seed: int, dtype: torch.dtype, capped: bool = False) -> tuple[Hidden, np.ndarray]:
    """The signal, and its logits in float64 from the numbers that it holds."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, WIDTH, generator=draw).to(dtype) for n in (TOKENS, VOCABULARY))
    bias = torch.randn(VOCABULARY, generator=draw).to(dtype)
    z = hidden.double() @ weight.double().T + bias.double()
    cap = (lambda raw: 3.0 * torch.tanh(raw / 3.0)) if capped else None
    return Hidden(hidden, Head(weight, bias, cap)), (cap(z) if cap else z).numpy()


@pytest.mark.parametrize("capped", [False, True])
def test_hidden_states_and_their_head_are_the_logits_they_make(capped: bool) -> None:
    for temperature in TEMPERATURES:
        signal, z_p = hidden_teacher(0, torch.float32, capped)
        _, log_p = signal.pair(student(logits(0)), temperature)
        np.testing.assert_allclose(log_p.exp().numpy(), reference.softmax(z_p, temperature), rtol=2e-5)
        _, piece = signal.chunk(2, 5).pair(student(logits(0)[2:5]), temperature)
        torch.testing.assert_close(piece, log_p[2:5])
    assert torch.equal(signal.first(student(logits(0)), 4), torch.from_numpy(z_p).topk(4).indices)


@pytest.mark.parametrize("seed", SEEDS)
def test_bfloat16_hidden_states_cost_the_rounding_of_one_logit_and_no_more(seed: int) -> None:
    """Each logit is rounded once, by at most 2^-8 of itself; a log-probability differs by two such errors at most."""
    signal, z_p = hidden_teacher(seed, torch.bfloat16)
    _, log_p = signal.pair(student(logits(seed)), 1.0)
    assert log_p.dtype == torch.float32
    bound = 2 * 2.0**-8 * np.abs(z_p).max() + 1e-5
    assert np.abs(log_p.double().numpy() - np.log(reference.softmax(z_p))).max() <= bound


def test_a_teacher_with_the_students_own_numbers_agrees_to_the_last_bit() -> None:
    signal, _ = hidden_teacher(0, torch.bfloat16)
    for outputs in (TokenLogits(signal.head.logits(signal.hidden), torch.zeros(TOKENS, dtype=torch.int64)),):
        for temperature in TEMPERATURES:
            log_q, log_p = signal.pair(outputs, temperature)
            assert torch.equal(log_q, log_p)


def test_first_choices_are_sorted_by_falling_probability_and_no_more_than_there_are() -> None:
    z_p = logits(100)
    outputs, wanted = student(logits(0)), np.argsort(-z_p, axis=-1)
    for signal in (Dense(torch.from_numpy(z_p)), teacher(z_p, VOCABULARY)):
        np.testing.assert_array_equal(signal.first(outputs, 5).numpy(), wanted[:, :5])
        assert signal.first(outputs, 99).shape == (TOKENS, VOCABULARY)
    assert teacher(z_p, 3).first(outputs, 5).shape == (TOKENS, 3)


def test_kept_mass_is_all_for_a_dense_teacher_and_that_of_its_tokens_for_a_top_k() -> None:
    z_q, z_p = logits(0), logits(100)
    assert all(mass.tolist() == [1.0] * TOKENS for mass in Dense(torch.from_numpy(z_p)).kept_mass(student(z_q)))
    ids, logprobs = reference.top(z_p, 4)
    mine, theirs = teacher(z_p, 4).kept_mass(student(z_q))
    np.testing.assert_allclose(theirs.numpy(), np.exp(logprobs).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(mine.detach().numpy(), np.take_along_axis(reference.softmax(z_q), ids, -1).sum(-1), rtol=1e-5)


def test_the_log_probability_of_the_label_comes_from_whoever_knows_it() -> None:
    z_p, labels = logits(100), torch.arange(TOKENS)
    outputs = TokenLogits(torch.from_numpy(logits(0)), labels)
    wanted = np.log(reference.softmax(z_p))[np.arange(TOKENS), np.arange(TOKENS)]
    np.testing.assert_allclose(Dense(torch.from_numpy(z_p)).label_logprobs(outputs).numpy(), wanted, rtol=1e-5)
    stored = PerToken(torch.from_numpy(wanted))
    np.testing.assert_allclose(stored.chunk(1, 3).label_logprobs(outputs).numpy(), wanted[1:3], rtol=1e-6)
    assert stored.label_logprobs(outputs).dtype == torch.float32


def test_the_teachers_side_carries_no_gradient_whatever_it_was_made_of() -> None:
    z_p, outputs = torch.from_numpy(logits(100)).requires_grad_(), student(logits(0))
    weight, states = torch.randn(VOCABULARY, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH, requires_grad=True)
    known = z_p.log_softmax(-1)
    signals = [Dense(z_p), Hidden(states, Head(weight)), *(TopK(torch.arange(4).expand(TOKENS, 4), known[:, :4], t) for t in TAILS)]
    for signal in signals:
        weights, log_q, log_p = signal.expect(outputs, 2.0)
        assert log_q.requires_grad and not log_p.requires_grad and not weights.requires_grad
        assert not signal.kept_mass(outputs)[1].requires_grad
    assert not PerToken(known[:, 0]).label_logprobs(outputs).requires_grad


def test_a_dense_signal_is_cut_by_tokens() -> None:
    z_p = torch.from_numpy(logits(100))
    assert torch.equal(Dense(z_p).chunk(2, 5).logits, z_p[2:5])


DRAWS = Sampled(torch.zeros((TOKENS, 2), dtype=torch.int64), torch.zeros((TOKENS, 2)), torch.full((TOKENS, 2), 0.5))
LABELS = PerToken(torch.zeros(TOKENS))


@pytest.mark.parametrize(
    ("signal", "ask"),
    [
        (DRAWS, lambda s, o: s.pair(o, 1.0)),
        (DRAWS, lambda s, o: s.first(o, 1)),
        (DRAWS, lambda s, o: s.kept_mass(o)),
        (DRAWS, lambda s, o: s.label_logprobs(o)),
        (LABELS, lambda s, o: s.pair(o, 1.0)),
        (LABELS, lambda s, o: s.expect(o, 1.0)),
        (LABELS, lambda s, o: s.first(o, 1)),
        (teacher(logits(100), 4), lambda s, o: s.label_logprobs(o)),
    ],
)
def test_a_signal_refuses_what_it_cannot_give_and_says_who_could(signal: Signal, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(ValueError, match=f"{type(signal).__name__} cannot give .*expected .*Dense"):
        ask(signal, student(logits(0)))


def test_draws_are_read_at_their_own_temperature_only() -> None:
    with pytest.raises(ValueError, match="drawn at temperature 1 and is read at 2; expected 1"):
        DRAWS.expect(student(logits(0)), 2.0)


def test_what_an_objective_reads_is_checked_against_what_its_signal_gives() -> None:
    whole, some = Dense(torch.from_numpy(logits(100))), teacher(logits(100), 4)
    assert all(given(whole, reads, "x") is whole for reads in ("pair", "expectation", "label"))
    assert given(some, "pair", "x") is some and given(DRAWS, "expectation", "x") is DRAWS and given(LABELS, "label", "x") is LABELS
    for signal, reads in ((some, "label"), (DRAWS, "pair"), (DRAWS, "label"), (LABELS, "pair"), (LABELS, "expectation")):
        with pytest.raises(ValueError, match=f"opd-pg cannot read the signal {type(signal).__name__}; expected"):
            given(signal, reads, "opd-pg")
