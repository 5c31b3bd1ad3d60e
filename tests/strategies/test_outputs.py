"""Recorded logits against plain autograd in float64: whatever mixture of uses, one gradient; and what the whole head makes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.outputs import RecordedLogits, TokenLogits

TOKENS, VOCABULARY = 5, 37
Use = Callable[[TokenLogits], Tensor]


def draw(seed: int, size: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(0, size, (TOKENS, VOCABULARY)).astype(np.float32))
    return z, torch.from_numpy(rng.integers(0, VOCABULARY, TOKENS))


def distinct(seed: int, k: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.permutation(VOCABULARY)[:k] for _ in range(TOKENS)]))


A, B = distinct(1, 4), distinct(2, 9)
REPEATED = torch.tensor([[3, 3, 5]] * TOKENS)


def tailed(ids: Tensor, temperature: float) -> Use:
    def use(outputs: TokenLogits) -> Tensor:
        inside, outside = outputs.partition(ids, temperature, want_tail=True)
        assert outside is not None
        return (inside.exp() * inside).sum() - 3.0 * outside.sin().sum()

    return use


USES: dict[str, Use] = {
    "labels": lambda o: o.label_logprobs().square().sum(),
    "tail": tailed(A, 1.0),
    "warm tail": tailed(A, 2.0),
    "cold tail": tailed(A, 0.3),
    "other tail": tailed(B, 1.0),
    "no tail": lambda o: o.partition(B, 1.5, want_tail=False)[0].cos().sum(),
    "repeated ids": lambda o: o.picked(REPEATED).square().sum(),
    "whole": lambda o: (o.logprobs(1.0).exp() * o.logprobs(1.0)).sum(),
    "warm whole": lambda o: o.logprobs(3.0).square().sum(),
    "logits": lambda o: 0.1 * o.logits.square().sum() + o.logits.sum(),
    "normaliser": lambda o: o.normaliser(2.0).square().sum(),
    "scaled by itself": lambda o: (o.logits * o.logits.detach()).sum(),
    "nothing": lambda o: torch.zeros(()),
    "values alone": lambda o: o.logprobs(1.0).detach().sum() + o.picked(A).detach().sum(),
}


def exact(z: Tensor, labels: Tensor, *uses: Use) -> tuple[float, Tensor]:
    leaf = z.double().requires_grad_()
    outputs = TokenLogits(leaf, labels)
    total = torch.stack([use(outputs).double() for use in uses]).sum()
    found = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return total.item(), torch.zeros_like(leaf) if found is None else found


def recorded(z: Tensor, labels: Tensor, *uses: Use) -> tuple[float, Tensor]:
    outputs = RecordedLogits(z.clone(), labels)
    total = torch.stack([use(outputs) for use in uses]).sum()
    return total.item(), outputs.gradient(total)


def same(got: tuple[float, Tensor], want: tuple[float, Tensor]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5, abs=1e-5)
    size = max(want[1].abs().max().item(), 1e-3)
    np.testing.assert_allclose(got[1].double().numpy(), want[1].numpy(), rtol=1e-4, atol=3e-6 * size)


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("seed", range(3))
def test_each_use_has_the_gradient_of_autograd(seed: int, name: str) -> None:
    z, labels = draw(seed)
    same(recorded(z, labels, USES[name]), exact(z, labels, USES[name]))


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_of_uses_in_any_order_has_the_gradient_of_autograd(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = rng.permutation(list(USES))[: rng.integers(2, len(USES))]
    uses = [USES[name] for name in names]
    z, labels = draw(seed)
    same(recorded(z, labels, *uses), exact(z, labels, *uses))


def test_the_gradient_takes_the_memory_of_the_logits() -> None:
    z, labels = draw(0)
    for use in USES.values():
        outputs = RecordedLogits(given := z.clone(), labels)
        assert outputs.gradient(use(outputs)).data_ptr() == given.data_ptr()


def test_terms_that_read_one_signal_share_its_masses() -> None:
    z, labels = draw(0)
    outputs = RecordedLogits(z, labels)
    for start in (0, 0):  # two views of the same ids, as two terms get
        outputs.partition(A[start:TOKENS], 1.0, want_tail=True)
    outputs.label_logprobs()
    assert len(outputs._masses) == 1
    assert len(outputs._picks) == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_tail_far_below_float32_teaches_as_much_as_any_other(temperature: float) -> None:
    z, labels = draw(0)
    z[:, 0] = 300.0
    ids = torch.zeros(TOKENS, 1, dtype=torch.int64)

    def miss(outputs: TokenLogits) -> Tensor:
        inside, outside = outputs.partition(ids, temperature, want_tail=True)
        assert outside is not None
        return -(0.7 * inside + 0.3 * outside).sum()

    got, want = recorded(z, labels, miss), exact(z, labels, miss)
    same(got, want)
    assert got[1][:, 1:].abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_impossible_tokens_have_no_gradient_and_spoil_nobody_elses(temperature: float) -> None:
    z, labels = draw(0)
    z[:, 10:] = -torch.inf
    ids = torch.arange(4).expand(TOKENS, 4)

    def miss(outputs: TokenLogits) -> Tensor:
        inside, outside = outputs.partition(ids, temperature, want_tail=True)
        assert outside is not None
        return -(inside.sum() + 2.0 * outside.sum()) + outputs.normaliser(1.0).sum()

    got, want = recorded(z, labels % 10, miss), exact(z, labels % 10, miss)
    same(got, want)
    assert not got[1][:, 10:].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_tail_of_impossible_tokens_is_nothing(temperature: float) -> None:
    z, labels = draw(0)
    z[:, 4:] = -torch.inf
    outputs = RecordedLogits(z.clone(), labels % 4)
    inside, outside = outputs.partition(torch.arange(4).expand(TOKENS, 4), temperature, want_tail=True)
    assert outside is not None and torch.isneginf(outside).all()
    np.testing.assert_allclose(inside.exp().sum(-1).detach().numpy(), 1.0, rtol=1e-5)
    gradient = outputs.gradient(inside.square().sum() - outside.sum())  # as the forward KL to a teacher that has a tail
    assert gradient.isfinite().all() and not gradient[:, 4:].any()
    same(
        (0.0, gradient[:, :4]),
        (0.0, exact(z[:, :4], labels % 4, lambda o: o.logprobs(temperature).square().sum() + o.normaliser(temperature).sum())[1]),
    )


def test_no_tokens_are_enough() -> None:
    z, labels = torch.zeros(0, VOCABULARY), torch.zeros(0, dtype=torch.int64)
    outputs = RecordedLogits(z, labels)
    total = outputs.label_logprobs().sum() + outputs.logprobs(2.0).sum()
    assert outputs.gradient(total).shape == (0, VOCABULARY)


def test_a_large_vocabulary_keeps_float32s_exactness() -> None:
    """Sums over 131,072 terms of one sign: the normaliser and its gradient stay within some units in the last place."""
    rng = np.random.default_rng(0)
    z, labels = torch.from_numpy(rng.normal(0, 2, (3, 131_072)).astype(np.float32)), torch.tensor([1, 2, 3])
    outputs = RecordedLogits(z.clone(), labels)
    total = outputs.normaliser(1.0).sum()
    np.testing.assert_allclose(total.item(), torch.logsumexp(z.double(), -1).sum().item(), rtol=3e-7)
    np.testing.assert_allclose(outputs.gradient(total).numpy(), z.double().softmax(-1).numpy(), rtol=5e-6)
