"""How the tests of objectives run them: through the chunked head, whose hidden states are the logits themselves.

Signals here are the smallest that meet the student: whole logits, and one log-probability per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from strategies.core import Progress, Reads, Term
from strategies.head import Head, TokenBatch, TokenLogits, chunked_terms
from strategies.schedule import constant

NOW = Progress(step=0, steps=10)


@dataclass(frozen=True)
class Dense:
    """A teacher's whole logits `(N, V)`."""

    logits: Tensor
    gives: ClassVar[frozenset[Reads]] = frozenset({"pair", "expectation"})
    whole: ClassVar[bool] = True

    def chunk(self, start: int, stop: int) -> Dense:
        return Dense(self.logits[start:stop])

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        return outputs.logprobs(temperature), (self.logits / temperature).log_softmax(-1)

    def expect(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        log_q, log_p = self.pair(outputs, temperature)
        return log_p.exp(), log_q, log_p


@dataclass(frozen=True)
class GivenTokens:
    """A log-probability per token, `(N,)`."""

    label_logprobs: Tensor
    gives: ClassVar[frozenset[Reads]] = frozenset({"label"})
    whole: ClassVar[bool] = False

    def chunk(self, start: int, stop: int) -> GivenTokens:
        return GivenTokens(self.label_logprobs[start:stop])


def floats(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)


def dense(z_p: Any) -> Dense:
    return Dense(floats(z_p))


def given_tokens(log_p: Any) -> GivenTokens:
    return GivenTokens(floats(log_p))


@dataclass(frozen=True)
class Tokens:
    """What one objective sees of a micro-batch besides logits."""

    labels: Any = None
    signal: Any = None
    weights: Any = None
    rows: Any = None

    def batch(self, count: int) -> TokenBatch:
        labels = torch.zeros(count, dtype=torch.int64) if self.labels is None else torch.as_tensor(self.labels, dtype=torch.int64)
        return TokenBatch(
            labels=labels,
            signals={} if self.signal is None else {"teacher": self.signal},
            weights={} if self.weights is None else {"term": floats(self.weights)},
            rows=None if self.rows is None else torch.as_tensor(self.rows, dtype=torch.int64),
        )


def run(objective: Any, z_q: Any, tokens: Tokens, chunk_tokens: int = 3, progress: Progress = NOW) -> tuple[float, np.ndarray]:
    """The objective's sum over logits `(N, V)` and its gradient with respect to them."""
    hidden = floats(z_q).clone()
    zeros = torch.zeros_like(hidden)
    impossible = torch.isinf(hidden)  # the head is linear and would make 0 * inf, so -inf comes as a bias of the whole batch
    hidden = torch.where(impossible, zeros, hidden).requires_grad_()
    width = hidden.shape[-1]
    bias = torch.where(impossible.all(0), -torch.inf, 0.0) if len(hidden) else torch.zeros(width)
    term = Term("term", objective, constant(1.0), None if tokens.signal is None else "teacher")
    head = Head(torch.eye(width), bias)
    sums = chunked_terms(hidden, head, tokens.batch(len(hidden)), (term,), {"term": 1.0}, progress, chunk_tokens)
    sums.loss.backward()
    assert hidden.grad is not None
    assert sums.loss.item() == sums.sums["term"].item() or np.isnan(sums.loss.item())
    return sums.loss.item(), hidden.grad.numpy()


def same(got: tuple[float, np.ndarray], want: tuple[float, np.ndarray], rtol: float = 2e-5) -> None:
    """Value and gradient agree, the gradient to a share of its largest entry."""
    np.testing.assert_allclose(got[0], want[0], rtol=rtol, atol=rtol * 1e-1)
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=rtol * max(float(np.abs(want[1]).max(initial=0.0)), 1e-2))
