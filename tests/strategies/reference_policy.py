"""Float64 references for policy gradients on written tokens, written from the formulas of each method, one by one.

Losses are functions of `log q(y)`, a float64 tensor `(N,)` with gradient; everything else is `(N,)` float64 without one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.strategies.reference import Array, softmax

Loss = Callable[[Tensor], Tensor]


def grpo(behaviour: Tensor, advantages: Tensor, low: float, high: float) -> Loss:
    """`-min(rho A, clip(rho, 1 - low, 1 + high) A)`, rho = q / q_old."""

    def loss(log_q: Tensor) -> Tensor:
        ratio = torch.exp(log_q) / torch.exp(behaviour)
        return -torch.minimum(ratio * advantages, torch.clip(ratio, 1 - low, 1 + high) * advantages)

    return loss


def kdrl(plain: Loss, log_p: Tensor, beta: float, mask: Tensor | float = 1.0) -> Loss:
    """`plain + beta c (log q - log p)^2 / 2`, the square with its gradient."""
    return lambda log_q: plain(log_q) + beta * mask * 0.5 * (log_q - log_p) ** 2


def rlad(behaviour: Tensor, log_p: Tensor, advantages: Tensor, alpha: float, low: float, high: float) -> Loss:
    """GRPO's surrogate with `rho = q / (q_old^alpha p^(1 - alpha))`."""

    def loss(log_q: Tensor) -> Tensor:
        ratio = torch.exp(log_q) / (torch.exp(behaviour) ** alpha * torch.exp(log_p) ** (1 - alpha))
        return -torch.minimum(ratio * advantages, torch.clip(ratio, 1 - low, 1 + high) * advantages)

    return loss


def reinforce(advantages: Callable[[Tensor], Tensor]) -> Loss:
    """`-sg[A] log q`, A a function of `sg[log q]`; reported as `-sg[A]`."""

    def loss(log_q: Tensor) -> Tensor:
        gain = advantages(log_q.detach())
        return -gain * log_q + (gain * log_q).detach() - gain

    return loss


def gopd_advantage(log_p: Tensor, log_b: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    """`lambda (log p - log b) - (log q - log b)`."""
    return lambda log_q: share * (log_p - log_b) - (log_q - log_b)


def over_tokens(loss: Loss, z: Array, labels: Array, weights: Array) -> tuple[float, Array]:
    """`sum w loss` and its gradient with respect to logits `(N, V)`."""
    leaf = torch.from_numpy(np.asarray(z, dtype=np.float64)).requires_grad_()
    log_q = leaf.log_softmax(-1)[torch.arange(len(z)), torch.from_numpy(np.asarray(labels))]
    value = (torch.from_numpy(np.asarray(weights, dtype=np.float64)) * loss(log_q)).sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient.numpy()


def extrapolated_target(z_p: Array, z_b: Array, share: float) -> Array:
    """`p*` proportional to `p^lambda b^(1 - lambda)`, `(V,)`."""
    weights = softmax(z_p) ** share * softmax(z_b) ** (1 - share)
    return np.asarray(weights / weights.sum())
