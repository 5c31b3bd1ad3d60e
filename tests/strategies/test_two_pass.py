"""Objectives of two passes in the chunked head: what the first pass sees, and that chunks never show."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads, Term, TwoPass
from strategies.head import Head, TermSums, TokenBatch, TokenLogits, chunked_terms
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from strategies.signals import Signal
from tests.strategies.chunking import NOW, Dense, GivenTokens, floats

TOKENS, WIDTH, VOCABULARY = 11, 6, 13
CHUNKS = [1, 3, TOKENS, TOKENS + 1]


class Spread(ObjectiveSettings):
    """Weighted sum of squared distances of `log q(label) - log p(label)` from their weighted mean: not a sum over tokens."""

    reads: ClassVar[Reads] = "label"
    type: str = "spread"

    def survey(self, outputs: TokenLogits, signal: Any, progress: Progress) -> Tensor:
        return (outputs.label_logprobs() - signal.label_logprobs)[:, None]

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        mean = (weights * surveyed[:, 0]).sum() / weights.sum().clamp_min(1e-9)
        return mean.expand(len(weights), 1)

    def settled(self, outputs: TokenLogits, signal: Any, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        gap = outputs.label_logprobs() - signal.label_logprobs
        return (weights * (gap - numbers[:, 0]).square()).sum()


@dataclass
class Witness:
    """Writes down every call, and asks for nothing. Not hashable, as an objective from elsewhere may be."""

    reads: ClassVar[Reads] = "nothing"
    surveyed: list[Tensor] = field(default_factory=list)
    signals: list[Signal | None] = field(default_factory=list)
    settles: list[tuple[Tensor, TokenBatch, Tensor, Progress]] = field(default_factory=list)
    second: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        assert not torch.is_grad_enabled() and not outputs.logits.requires_grad
        self.surveyed.append(outputs.logits.detach().clone())  # the head uses the memory again
        self.signals.append(signal)
        return torch.stack([outputs.labels.float(), outputs.label_logprobs()], -1)

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        assert not torch.is_grad_enabled()
        self.settles.append((surveyed, batch, weights, progress))
        return torch.arange(3.0 * len(surveyed)).view(-1, 3)

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        self.second.append((outputs.logits.detach().clone(), weights, numbers))
        return outputs.logits.sum()


SPREAD = Term("spread", Spread(), constant(1.0), signal="given")
CE = Term("ce", CrossEntropy(), constant(1.0))
KD = Term("kd", ForwardKL(temperature=2.0), constant(1.0), signal="dense")


def witness_term() -> tuple[Witness, Term]:
    witness = Witness()
    return witness, Term("witness", witness, constant(1.0), signal="given")


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    batch: TokenBatch

    def run(self, terms: tuple[Term, ...], chunk_tokens: int = 3, progress: Progress = NOW, **head: Any) -> TermSums:
        scales = {t.name: 0.5 + i for i, t in enumerate(terms)}
        return chunked_terms(self.hidden, Head(self.weight, self.bias, **head), self.batch, terms, scales, progress, chunk_tokens)

    @property
    def gradients(self) -> list[np.ndarray]:
        return [leaf.grad.double().numpy() for leaf in (self.hidden, self.weight, self.bias) if leaf.grad is not None]


def make_case(seed: int = 0, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> Case:
    draw = np.random.default_rng(seed)
    batch = TokenBatch(
        labels=torch.from_numpy(draw.integers(0, VOCABULARY, tokens)),
        signals={
            "given": GivenTokens(floats(-draw.exponential(2, tokens))),
            "dense": Dense(floats(draw.normal(0, 2, (tokens, VOCABULARY)))),
        },
        weights={"spread": floats(draw.integers(0, 3, tokens)), "ce": floats(draw.random(tokens))},
        rows=torch.from_numpy(draw.integers(0, 4, tokens)),
    )
    leaf = [floats(draw.normal(0, s, shape)) for s, shape in ((1, (tokens, WIDTH)), (0.7, (VOCABULARY, WIDTH)), (0.5, VOCABULARY))]
    return Case(leaf[0].to(dtype).requires_grad_(), leaf[1].requires_grad_(), leaf[2].requires_grad_(), batch)


def spread_at_once(case: Case) -> tuple[float, list[np.ndarray]]:
    """The whole `(N, V)` at once, by float64 autograd, without a first pass."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (case.hidden, case.weight, case.bias)]
    logprobs = (leaves[0] @ leaves[1].T + leaves[2]).log_softmax(-1)
    given: Any = case.batch.signals["given"]
    weights = case.batch.weights["spread"].double()
    gap = logprobs.gather(-1, case.batch.labels[:, None])[:, 0] - given.label_logprobs.double()
    value = (weights * (gap - (weights * gap).sum() / weights.sum()).square()).sum()
    return value.item(), [g.numpy() for g in torch.autograd.grad(0.5 * value, leaves)]


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("seed", range(3))
def test_an_objective_of_all_tokens_is_exact_under_any_chunking(seed: int, chunk_tokens: int) -> None:
    case = make_case(seed)
    value, gradients = spread_at_once(case)
    got = case.run((SPREAD,), chunk_tokens)
    got.loss.backward()
    assert got.sums["spread"].item() == pytest.approx(value, rel=1e-5)
    assert got.loss.item() == pytest.approx(0.5 * value, rel=1e-5)
    for mine, want in zip(case.gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, want, atol=1e-5 * np.abs(want).max())


def test_terms_of_one_and_two_passes_stand_beside_each_other() -> None:
    terms, case = (CE, SPREAD, KD), make_case()
    got = case.run(terms)
    got.loss.backward()
    total = [np.zeros_like(g) for g in case.gradients]
    for i, term in enumerate(terms):
        single = make_case()
        part = single.run((term,))
        (part.loss * (0.5 + i) / 0.5).backward()
        assert got.sums[term.name].item() == pytest.approx(part.sums[term.name].item(), rel=1e-6)
        total = [a + b for a, b in zip(total, single.gradients, strict=True)]
    for mine, want in zip(case.gradients, total, strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-6 * np.abs(want).max())


def test_each_objective_of_two_passes_has_its_own_signal_weights_and_numbers() -> None:
    case = make_case()
    unweighted = replace(SPREAD, name="unweighted")
    got = case.run((SPREAD, unweighted))
    ones = replace(case.batch, weights={"spread": torch.ones(TOKENS)})
    want = spread_at_once(replace(case, batch=ones))[0]
    assert got.sums["spread"].item() == pytest.approx(spread_at_once(case)[0], rel=1e-5)
    assert got.sums["unweighted"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_the_first_pass_sees_the_logits_and_signals_of_the_second_and_all_tokens_are_settled_once(chunk_tokens: int) -> None:
    case, (witness, term), later = make_case(), witness_term(), Progress(step=4, steps=9)
    case.run((term,), chunk_tokens, later)
    assert [len(z) for z in witness.surveyed] == [len(z) for z, _, _ in witness.second]
    assert all(torch.equal(a, b) for a, (b, _, _) in zip(witness.surveyed, witness.second, strict=True))
    seen = torch.cat([signal.label_logprobs for signal in witness.signals if isinstance(signal, GivenTokens)])
    given: Any = case.batch.signals["given"]
    assert torch.equal(seen, given.label_logprobs)
    ((surveyed, batch, weights, progress),) = witness.settles
    assert batch is case.batch and progress == later
    assert torch.equal(surveyed[:, 0], case.batch.labels.float())
    assert torch.equal(weights, torch.ones(TOKENS))
    assert torch.equal(torch.cat([numbers for _, _, numbers in witness.second]), torch.arange(3.0 * TOKENS).view(-1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_passes_transform_and_round_alike(dtype: torch.dtype) -> None:
    case, (witness, term) = make_case(dtype=dtype), witness_term()
    case.run((term,), transform=lambda z: 2.0 * torch.tanh(z / 2.0))
    assert torch.equal(torch.cat(witness.surveyed), torch.cat([z for z, _, _ in witness.second]))
    assert torch.cat(witness.surveyed).abs().max() <= 2.0
    assert witness.surveyed[0].dtype == torch.float32


def test_without_an_objective_of_two_passes_the_head_runs_once_and_with_one_twice() -> None:
    runs: list[int] = []

    def counted(z: Tensor) -> Tensor:
        runs.append(len(z))
        return z

    make_case().run((CE, KD), chunk_tokens=4, transform=counted)
    assert runs == [4, 4, 3]
    runs.clear()
    make_case().run((CE, SPREAD), chunk_tokens=4, transform=counted)
    assert runs == [4, 4, 3, 4, 4, 3]


def test_no_tokens_are_not_settled_and_give_a_backward_for_ranks_to_meet_in() -> None:
    case, (witness, term) = make_case(tokens=0), witness_term()
    got = case.run((SPREAD, term))
    got.loss.backward()
    assert not witness.settles
    assert got.loss.item() == 0.0 and got.sums["spread"].item() == 0.0
    assert len(case.gradients) == 3 and not any(g.any() for g in case.gradients)


def test_zero_weights_give_zero_gradients() -> None:
    case = make_case()
    case = replace(case, batch=replace(case.batch, weights={"spread": torch.zeros(TOKENS)}))
    case.run((SPREAD,)).loss.backward()
    assert not any(g.any() for g in case.gradients)


def test_a_frozen_head_passes_the_gradient_through_and_evaluation_asks_for_none() -> None:
    case = make_case()
    want = spread_at_once(case)
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    case.run((SPREAD,)).loss.backward()
    (by_hidden,) = case.gradients
    np.testing.assert_allclose(by_hidden, want[1][0], atol=1e-5 * np.abs(want[1][0]).max())
    with torch.no_grad():
        assert make_case().run((SPREAD,)).sums["spread"].item() == pytest.approx(want[0], rel=1e-5)


def test_what_has_two_passes_is_told_by_its_methods() -> None:
    assert isinstance(Spread(), TwoPass) and isinstance(Witness(), TwoPass)
    assert not isinstance(ForwardKL(), TwoPass) and not isinstance(CrossEntropy(), TwoPass)
