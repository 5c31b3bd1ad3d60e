"""Float64 references for objectives across two tokenizers, span by span and token by token; gradients by autograd on the logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Found = tuple[float, np.ndarray]


def with_gradient(value: Callable[[Tensor], Tensor], z_q: np.ndarray) -> Found:
    """A value of logits `(N, V)` and its gradient, in float64."""
    logits = torch.tensor(z_q, dtype=torch.float64, requires_grad=True)
    total = value(logits)
    total.backward()
    assert logits.grad is not None
    return total.item(), logits.grad.numpy()


def span_likelihood(
    z_q: np.ndarray,
    labels: np.ndarray,
    span: np.ndarray,
    log_p: np.ndarray,
    weights: np.ndarray,
    tau: float,
    distance: str,
    begins: tuple[np.ndarray, list[int]] | None = None,
) -> Found:
    """`sum_c W_c tau D((P, 1-P), (Q, 1-Q))`, W_c the weights of the student's tokens of span c; with `begins` of spans and a unit behind
    them, of the ids that follow: the teacher's log-probabilities at the token behind a span, above 0 for none."""

    def value(logits: Tensor) -> Tensor:
        own = logits.log_softmax(-1)[torch.arange(len(labels)), torch.as_tensor(labels)]
        total = logits.sum() * 0.0
        for c in sorted(set(span.tolist()) - {-1}):
            inside = np.flatnonzero(span == c)
            l_p, l_q, behind = torch.tensor(log_p[inside].sum(), dtype=torch.float64), own[inside].sum(), inside[-1] + 1
            if begins is not None and behind < len(span) and begins[0][behind] <= 0:
                l_p = l_p + begins[0][behind]
                l_q = l_q + logits[behind].softmax(-1)[begins[1]].sum().log()
            p, q = (l_p / tau).exp(), (l_q / tau).exp()
            d = {
                "kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
                "reverse-kl": q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log(),
                "total-variation": (p - q).abs(),
            }[distance]
            total = total + weights[inside].sum() * tau * d
        return total

    return with_gradient(value, z_q)


def foreign_uld(z_q: np.ndarray, ids: np.ndarray, log_p: np.ndarray, weights: np.ndarray) -> Found:
    """`sum |sort p - sort q|` over what is not shared: K kept numbers of either side, and the rest as one more."""

    def value(logits: Tensor) -> Tensor:
        total = logits.sum() * 0.0
        for i, w in enumerate(weights):
            q, p = logits[i].softmax(-1), np.exp(log_p[i].astype(np.float64))
            shared = ids[i] >= 0
            free = [v for v in range(logits.shape[-1]) if v not in set(ids[i][shared].tolist())]
            ours = q[free].sort(descending=True).values
            theirs = torch.tensor(sorted(p[~shared], reverse=True) + [0.0] * int(shared.sum()), dtype=torch.float64)
            k = len(theirs)
            head = torch.cat([ours[:k], torch.zeros(max(0, k - len(ours)), dtype=torch.float64)])
            total = total + w * ((theirs - head).abs().sum() + (1 - p.sum() - ours[k:].sum()).abs())
        return total

    return with_gradient(value, z_q)


def shared_tokens(z_q: np.ndarray, ids: np.ndarray, log_p: np.ndarray, weights: np.ndarray, beta: float) -> Found:
    """The rescaled divergence on shared tokens, each an outcome, and everything else as one more."""

    def value(logits: Tensor) -> Tensor:
        total = logits.sum() * 0.0
        for i, w in enumerate(weights):
            shared = ids[i] >= 0
            q, p = logits[i].softmax(-1)[ids[i][shared]], torch.tensor(np.exp(log_p[i][shared].astype(np.float64)))
            q, p = (torch.cat([side, 1 - side.sum(-1, keepdim=True)]) for side in (q, p))
            m = beta * p + (1 - beta) * q
            total = total + w * (beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()) / (beta * (1 - beta))
        return total

    return with_gradient(value, z_q)
