"""Divergences between a teacher p and the student q on aligned log-probabilities: both KLs, their sums, total variation.

Each function takes natural log-probabilities `(N, M)` of distributions and returns one value per token, `(N,)`. Values
are added from terms that are none below 0 (a KL's term is `p log(p/q) - p + q`, whose extra parts cancel in the sum), so
that rounding of the normalisers does not enter where p and q nearly agree, and a value never falls below 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from strategies.core import Progress, Reads
from strategies.head import TokenLogits
from strategies.objectives.base import Divergence, analytic
from strategies.schedule import Share, schedule
from strategies.signals import Signal


@analytic
def forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q), with 0 log 0 = 0. Hinton et al., arXiv:1503.02531; Kim & Rush, arXiv:1606.07947."""
    p = log_p.exp()
    slopes = log_q.exp().sub_(p)
    terms = (log_p - log_q).mul_(p).nan_to_num_(nan=0.0, posinf=torch.inf).add_(slopes)
    return terms.clamp_min_(0.0).sum(-1), slopes


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p), with 0 log 0 = 0. Gu et al., arXiv:2306.08543.

    Tokens that the teacher rules out are left out on both sides: q is renormalised over the others, or one padded id would
    make every value infinite. The student's mass on them is free, so put a forward loss beside this one when it matters.
    """
    return _reverse_kl(_within(log_q, log_p), log_p)


@analytic
def _reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    slopes = (log_q - log_p).mul_(q).nan_to_num_(nan=0.0, posinf=torch.inf)
    terms = log_p.exp().sub_(q).add_(slopes)
    return terms.clamp_min_(0.0).sum(-1), slopes


def _within(log_q: Tensor, log_p: Tensor) -> Tensor:
    """log q given that the token is one the teacher can say."""
    ruled_out = torch.isneginf(log_p)
    if not ruled_out.any():
        return log_q
    outside = (log_q.exp() * ruled_out).sum(-1, keepdim=True).clamp_max(1.0 - 1e-6)
    return torch.where(ruled_out, -torch.inf, log_q - torch.log1p(-outside))


def jeffreys(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p): the whole sum, as Jeffreys (1946) has it, and not its half."""
    return forward_kl(log_q, log_p) + reverse_kl(log_q, log_p)


@analytic
def total_variation(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """TV = 1/2 sum |p - q|, from 0 to 1. Its gradient is that of signs: 0 where p = q exactly, and small for a confident q."""
    q = log_q.exp()
    gap = q - log_p.exp()
    return 0.5 * gap.abs().sum(-1), gap.sign_().mul_(q).mul_(0.5)


HEAD_TOKENS = 1024
"""Choices looked at before a whole vocabulary is sorted: of language models, nearly always enough for half of the mass."""


@torch.no_grad()
def head_share(log_q: Tensor, log_p: Tensor, mass: float) -> Tensor:
    """Share of `sum |p - q|` that lies in the teacher's head, `(N,)`; 1/2 where there is no gap at all.

    The head is the first choice and every token at which the mass counted from the top is at most `mass`. Which of several
    equally likely tokens comes first is not defined.
    """
    p = log_p.exp()
    gap = (p - log_q.exp()).abs_()
    falling, order = p.topk(min(HEAD_TOKENS, p.shape[-1]), -1)
    if not (falling.sum(-1) > mass).all():  # some head is longer than that
        falling, order = p.sort(dim=-1, descending=True)
    head = falling.cumsum(-1) <= mass
    head[:, 0] = True
    inside, whole = torch.where(head, gap.gather(-1, order), 0.0).sum(-1), gap.sum(-1)
    return torch.where(whole > 0, (inside / whole).clamp_max(1.0), 0.5)  # not past 1 by rounding


def adaptive_kl(log_q: Tensor, log_p: Tensor, mass: float) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w = `head_share`, which carries no gradient. Wu et al., arXiv:2404.02657."""
    share = head_share(log_q, log_p, mass)
    return share * forward_kl(log_q, log_p) + (1.0 - share) * reverse_kl(log_q, log_p)


class ForwardKL(Divergence):
    """Weighted sum over tokens of `T^2 KL(p_T || q_T)`: exact on a whole distribution, a lower bound on a bucketed top-k,
    unbiased on draws, where single values may be below 0."""

    reads: ClassVar[Reads] = "expectation"
    type: Literal["forward-kl"] = "forward-kl"

    def values(self, outputs: TokenLogits, signal: Signal, temperature: float, progress: Progress) -> Tensor:
        if signal.whole:
            return forward_kl(*signal.pair(outputs, temperature))
        weights, log_q, log_p = signal.expect(outputs, temperature)
        return (weights * torch.where(weights != 0, log_p - log_q, 0.0)).sum(-1)


class ReverseKL(Divergence):
    """Weighted sum over tokens of `T^2 KL(q_T || p_T)`. A top-k chosen by the teacher prices the student's mass outside it
    as one bucket at most; ids that the teacher lacks are left out (see `reverse_kl`)."""

    type: Literal["reverse-kl"] = "reverse-kl"

    def values(self, outputs: TokenLogits, signal: Signal, temperature: float, progress: Progress) -> Tensor:
        log_q, log_p = signal.pair(outputs, temperature)
        if signal.whole:
            return reverse_kl(log_q, log_p)
        q = log_q.exp()
        return (q * torch.where((q > 0) & ~torch.isneginf(log_p), log_q - log_p, 0.0)).sum(-1)


class Jeffreys(Divergence):
    """Weighted sum over tokens of `T^2 (KL(p_T || q_T) + KL(q_T || p_T))`; twice the mean of both."""

    type: Literal["jeffreys"] = "jeffreys"

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return jeffreys(log_q, log_p)


class TotalVariation(Divergence):
    """Weighted sum over tokens of `T TV(p_T, q_T)`. Wen et al., arXiv:2307.15190, without their sampling."""

    order: ClassVar[int] = 1
    type: Literal["total-variation"] = "total-variation"

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return total_variation(log_q, log_p)


class AdaptiveKL(Divergence):
    """Weighted sum over tokens of `T^2 (w KL(p_T || q_T) + (1 - w) KL(q_T || p_T))`: forward where the gap is in the
    teacher's head, reverse where it is in the tail. Wu et al., arXiv:2404.02657.

    Sorts the teacher's probabilities where its head is long. On a bucketed top-k the bucket counts as one token.
    """

    type: Literal["adaptive-kl"] = "adaptive-kl"
    head_mass: Share = 0.5
    """Teacher mass at which the head ends; the paper's mu."""

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return adaptive_kl(log_q, log_p, schedule(self.head_mass)(progress))
