"""Divergences from a mixture of teacher and student, and power divergences: all bounded or interpolating between the KLs.

Conventions of `divergence.py`. Mixtures are reached through `log p - log q`: with `m = c p + (1 - c) q`,
`log m - log q = log1p(c expm1(log p - log q))` keeps its digits where p and q nearly agree and where c is small.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, model_validator
from torch import Tensor

from strategies.core import Progress
from strategies.objectives.base import RATIO_LIMIT, Divergence, analytic, log_ratio
from strategies.objectives.divergence import forward_kl, reverse_kl
from strategies.schedule import PositiveSchedule, ScheduleConfig, Share, schedule, values_of

NEGLIGIBLE = 1e-30
"""A share below this is 0: float32 could not divide by it."""


def jsd(log_q: Tensor, log_p: Tensor, beta: float, rescale: bool = True) -> Tensor:
    """`b KL(p || m) + (1 - b) KL(q || m)`, `m = b p + (1 - b) q`: beta weighs the teacher (GKD, arXiv:2306.13649, section 2).

    Rescaled by `1 / (b (1 - b))` it runs from KL(p || q) at 0 to KL(q || p) at 1 without a jump; at 1/2 it is four times
    the Jensen-Shannon divergence. Without it the ends are those KLs all the same, as GKD has them, and everything between
    tends to 0 there.
    """
    if beta < NEGLIGIBLE:
        return forward_kl(log_q, log_p)
    if beta == 1.0:
        return reverse_kl(log_q, log_p)
    return _rescaled_jsd(log_q, log_p, beta) * (1.0 if rescale else beta * (1.0 - beta))


@analytic
def _rescaled_jsd(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    ratio, first, second, share = log_ratio(log_q, log_p), log_p.exp(), log_q.exp(), beta
    swapped = beta > 0.5  # the same value with the sides exchanged, which keeps its digits as beta nears 1
    if swapped:
        ratio, first, second, share = ratio.neg_(), second, first, 1.0 - beta
    lift = torch.expm1(ratio).mul_(share).log1p_().div_(share)  # (log m - log second) / share
    terms = torch.lerp(second, first, share).mul_(lift).neg_().addcmul_(first, ratio)
    slopes = ratio.sub_(lift, alpha=share).mul_(first).div_(beta) if swapped else lift.mul_(second).neg_()
    return terms.clamp_min_(0.0).sum(-1) / (1.0 - share), slopes


def skew_kl(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
    """KL(p || l p + (1 - l) q), at most log(1/l). Ko et al., arXiv:2402.03898, section 3.1. l = 0 is KL(p || q)."""
    return forward_kl(log_q, log_p) if skew == 0.0 else _skew_kl(log_q, log_p, skew)


@analytic
def _skew_kl(log_q: Tensor, log_p: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    p, q, over = log_p.exp(), log_q.exp(), _over_mixture(log_ratio(log_q, log_p), skew)
    terms = (q - p).mul_(1.0 - skew).addcmul_(p, over)
    return terms.clamp_min_(0.0).sum(-1), over.expm1_().mul_(q).mul_(skew - 1.0)


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, skew: float, detach_mix: bool = False) -> Tensor:
    """KL(q || l q + (1 - l) p), at most log(1/l). Ko et al., arXiv:2402.03898, section 3.1. l = 0 is KL(q || p).

    `detach_mix` keeps the value and takes the mixture's student part as given in the gradient.
    """
    return reverse_kl(log_q, log_p) if skew == 0.0 else _skew_reverse_kl(log_q, log_p, skew, detach_mix)


@analytic
def _skew_reverse_kl(log_q: Tensor, log_p: Tensor, skew: float, detach_mix: bool) -> tuple[Tensor, Tensor]:
    p, q, over = log_p.exp(), log_q.exp(), _over_mixture(log_ratio(log_p, log_q), skew)
    terms = (p - q).mul_(1.0 - skew).addcmul_(q, over)
    slopes = q * over
    if not detach_mix:
        slopes.addcmul_(q, over.expm1_(), value=-skew)
    return terms.clamp_min_(0.0).sum(-1), slopes


def _over_mixture(ratio: Tensor, share: float) -> Tensor:
    """`log first - log(share first + (1 - share) second)` of `ratio = log first - log second`, which is not kept."""
    return ratio.sub_(torch.expm1(ratio).mul_(share).log1p_())


def alpha_divergence(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Amari's `(1 - sum p^a q^(1-a)) / (a (1 - a))`: KL(q || p) at 0, four squared Hellinger distances at 1/2, KL(p || q) at 1.

    Between the ends, a token that only the student can say costs q/a; at 0, where that has no bound, it is left out.
    """
    if alpha < NEGLIGIBLE:
        return reverse_kl(log_q, log_p)
    if alpha == 1.0:
        return forward_kl(log_q, log_p)
    return _alpha_divergence(log_q, log_p, alpha)


@analytic
def _alpha_divergence(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    p, q, ratio = log_p.exp(), log_q.exp(), (log_p - log_q).nan_to_num_(nan=0.0)
    if alpha <= 0.5:
        slopes = ratio.clamp_(max=RATIO_LIMIT).mul_(alpha).expm1_().div_(-alpha).mul_(q)
        terms = p.sub_(q).add_(slopes).div_(1.0 - alpha)
        return terms.clamp_min_(0.0).sum(-1), slopes
    bent = ratio.clamp_(min=-RATIO_LIMIT).mul_(alpha - 1.0).expm1_().mul_(p)  # p^a q^(1-a) - p
    q.sub_(p)
    terms = torch.add(q, bent, alpha=1.0 / (alpha - 1.0)).div_(alpha)
    return terms.clamp_min_(0.0).sum(-1), q.sub_(bent).div_(alpha)


def renyi(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Rényi's `log(sum p^a q^(1-a)) / (a - 1)` for a > 0; KL(p || q) at 1. Van Erven & Harremoës, arXiv:1206.2459, eq. 1."""
    if alpha == 1.0:
        return forward_kl(log_q, log_p)
    excess = alpha * (alpha - 1.0) * alpha_divergence(log_q, log_p, alpha)  # sum p^a q^(1-a) - 1
    near = torch.log1p(excess.clamp(-0.5, 0.5)) / (alpha - 1.0)
    return torch.where(excess.abs() < 0.5, near, _far_renyi(log_q, log_p, alpha))


@analytic
def _far_renyi(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    tilted = (alpha * log_p).add_(log_q, alpha=1.0 - alpha).masked_fill_(torch.isneginf(log_p), -torch.inf)
    return tilted.logsumexp(-1) / (alpha - 1.0), tilted.softmax(-1).neg_()


class JSD(Divergence):
    """Weighted sum over tokens of `T^2` times the generalised Jensen-Shannon divergence (see `jsd`), beta on the teacher.

    `rescale=False` refuses a schedule that touches 0 or 1: the loss would jump by orders of magnitude on its way.
    """

    type: Literal["jsd"] = "jsd"
    beta: Share = 0.5
    """0 is forward KL, 1 reverse KL."""
    rescale: bool = True
    """Whether `1 / (b (1 - b))` multiplies, so that one learning rate fits all beta."""

    @model_validator(mode="after")
    def _no_jump(self) -> Self:
        if not self.rescale and not isinstance(self.beta, float) and any(b in (0.0, 1.0) for b in values_of(self.beta)):
            raise ValueError("beta: got a schedule that touches 0 or 1 with rescale=false; expected rescale=true, or an inner range")
        return self

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return jsd(log_q, log_p, schedule(self.beta)(progress), self.rescale)


def _each_below_one(value: ScheduleConfig) -> ScheduleConfig:
    if any(v >= 1 for v in values_of(value)):
        raise ValueError("expected values below 1 throughout the schedule: at 1 nothing is left to learn")
    return value


Skew = Annotated[Share, AfterValidator(_each_below_one)]


class SkewKL(Divergence):
    """Weighted sum over tokens of `T^2 KL(p_T || l p_T + (1 - l) q_T)`: DistiLLM, arXiv:2402.03898. Not rescaled by
    `1 / (1 - l)^2`, so a search over the skew is also one over the learning rate."""

    type: Literal["skew-kl"] = "skew-kl"
    skew: Skew = 0.1
    """Share l of the first argument in the mixture."""

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return skew_kl(log_q, log_p, schedule(self.skew)(progress))


class SkewReverseKL(Divergence):
    """Weighted sum over tokens of `T^2 KL(q_T || l q_T + (1 - l) p_T)`: DistiLLM, arXiv:2402.03898. Not rescaled."""

    type: Literal["skew-reverse-kl"] = "skew-reverse-kl"
    skew: Skew = 0.1
    """Share l of the first argument in the mixture."""
    detach_mix: bool = False
    """Whether the mixture's student part is taken as given. Forward skew KL has no such option: nothing would be left."""

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return skew_reverse_kl(log_q, log_p, schedule(self.skew)(progress), self.detach_mix)


class AlphaDivergence(Divergence):
    """Weighted sum over tokens of `T^2` times Amari's alpha-divergence (see `alpha_divergence`)."""

    type: Literal["alpha"] = "alpha"
    alpha: Share = 0.5
    """0 is reverse KL, 1 forward KL, with no jump on the way."""

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return alpha_divergence(log_q, log_p, schedule(self.alpha)(progress))


class Renyi(Divergence):
    """Weighted sum over tokens of `T^2` times Rényi's divergence of p from q (see `renyi`); about alpha times forward KL
    where p and q nearly agree."""

    type: Literal["renyi"] = "renyi"
    alpha: PositiveSchedule = 0.5
    """1 is forward KL; above it, single tokens that the student misses dominate."""

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return renyi(log_q, log_p, schedule(self.alpha)(progress))
