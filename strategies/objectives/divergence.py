"""Divergences between a teacher p and the student q on aligned log-probabilities.

Each function takes natural log-probabilities `(N, M)` and returns one non-negative value per token, `(N,)`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenLogits
from strategies.schedule import PositiveSchedule, schedule
from strategies.signals import Signal


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), with 0 log 0 = 0. Hinton et al., arXiv:1503.02531; Kim & Rush, arXiv:1606.07947."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p), with 0 log 0 = 0. Gu et al., arXiv:2306.08543."""
    q = log_q.exp()
    return (q * torch.where(q > 0, log_q - log_p, 0.0)).sum(-1)  # masked before the product: 0 * inf has no gradient


class ForwardKL(ObjectiveSettings):
    """Weighted sum over tokens of `T^2 KL(p_T || q_T)` against any signal that pairs with dense student logits.

    `t_scale="auto"` multiplies by T^2, so that the logit gradient keeps its size as T grows (arXiv:1503.02531, section 2).
    """

    reads: ClassVar[Reads] = "expectation"
    type: Literal["forward-kl"] = "forward-kl"
    temperature: PositiveSchedule = 1.0
    """Divides both sides' logits."""
    t_scale: Literal["auto", "none"] = "auto"
    """Whether T^2 multiplies the divergence."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        if signal is None:
            raise ValueError("ForwardKL compares with a teacher, and its term names no signal")
        temperature = schedule(self.temperature)(progress)
        log_q, log_p = signal.pair(outputs, temperature)
        scale = temperature**2 if self.t_scale == "auto" else 1.0
        return scale * (weights * forward_kl(log_q, log_p)).sum()
