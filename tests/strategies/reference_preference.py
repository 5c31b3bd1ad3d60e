"""Float64 references for preferences between sequences: plain autograd over whole rows, without passes, chunks or slopes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.strategies.reference import Array, Ids

Loss = Callable[[Tensor, Tensor, int, int], Tensor]
"""Loss of one pair from summed log-probabilities of the chosen and the rejected row and from their lengths."""


def dpo(beta: float, reference: Array, rows: Ids, normalised: bool = False) -> Callable[[int], Loss]:
    """`-log sigmoid(beta ((pi_w - ref_w) - (pi_l - ref_l)))` for pair i."""

    def of(pair: int) -> Loss:
        ref = [float(reference[rows == 2 * pair + side].sum()) for side in (0, 1)]

        def loss(chosen: Tensor, rejected: Tensor, long: int, short: int) -> Tensor:
            by = (long, short) if normalised else (1, 1)
            return -torch.log(torch.sigmoid(beta * ((chosen - ref[0]) / by[0] - (rejected - ref[1]) / by[1])))

        return loss

    return of


def simpo(beta: float, gamma: float) -> Callable[[int], Loss]:
    return lambda pair: lambda good, bad, n, m: -torch.log(torch.sigmoid(beta / n * good - beta / m * bad - gamma))


def redi(alpha: float) -> Callable[[int], Loss]:
    return lambda pair: lambda good, bad, n, m: -good / n + alpha * bad / m


def over_pairs(z: Array, labels: Ids, rows: Ids, pair_weights: dict[int, float], loss: Callable[[int], Loss]) -> tuple[float, Array]:
    """Weighted sum over pairs and its gradient with respect to logits `(N, V)`."""
    leaf = torch.from_numpy(np.asarray(z, dtype=np.float64)).requires_grad_()
    logprobs = leaf.log_softmax(-1)[torch.arange(len(labels)), torch.from_numpy(labels)]
    total = torch.zeros((), dtype=torch.float64)
    for pair, weight in pair_weights.items():
        chosen, rejected = (torch.from_numpy(rows == 2 * pair + side) for side in (0, 1))
        counts = int(chosen.sum()), int(rejected.sum())
        total = total + weight * loss(pair)(logprobs[chosen].sum(), logprobs[rejected].sum(), *counts)
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.item(), gradient.numpy()
