"""Transport distances: between sorted probabilities (ULD), and between the tokens of a batch (Sinkhorn)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import pad

from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenLogits
from strategies.schedule import PositiveSchedule, schedule
from strategies.signals import Signal, given

ROUNDING = 64
"""Differences below this many units in the last place are none: |p - q| has a slope of size 1 right beside equality."""


def snapped(q: Tensor, p: Tensor) -> Tensor:
    """q `(N, M)` with the value of p where the two differ by rounding alone; the gradient is q's everywhere."""
    near = (p - q).abs() <= ROUNDING * torch.finfo(q.dtype).eps * torch.maximum(p, q)
    return q + torch.where(near, p - q, 0.0).detach()


def uld(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`sum |sort p - sort q|` per token, `(N,)` in [0, 2], of log-probabilities `(N, M)` and `(N, M')`; the shorter gets zeros."""
    q, p = (log.exp().sort(-1, descending=True).values for log in (log_q, log_p))
    wide = max(q.shape[-1], p.shape[-1])
    q, p = pad(q, (0, wide - q.shape[-1])), pad(p, (0, wide - p.shape[-1]))
    return (p - snapped(q, p)).abs().sum(-1)


def transport_cost(source: Tensor, target: Tensor, masses: Tensor, regularisation: float, iterations: int) -> Tensor:
    """`sum P C` between the rows of `source` and `target`, both `(B, M)`: `C_ij = |s_i - t_j|_1`, a scalar.

    P starts as `exp(-C / regularisation)`; `iterations` times its rows, then its columns, are scaled to sum to `masses`
    `(B,)`, which are above 0. Computed on logarithms, so that a small regularisation does not underflow. The gradient
    goes through the iterations.
    """
    cost = torch.cdist(source, target, p=1.0)
    log_plan, log_masses = -cost / regularisation, masses.log()
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True) + log_masses[:, None]
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) + log_masses
    return (log_plan.exp() * cost).sum()


class ULD(ObjectiveSettings):
    """Universal logit distillation: weighted sum over tokens of `T sum |sort p_T - sort q_T|`.

    Boizard et al., arXiv:2402.12030: a Wasserstein distance between probabilities as points on a line, which asks neither
    for one vocabulary nor for one size. Positions must be aligned already. It is blind to *which* token is likely: every permutation of the
    teacher gives 0, so never use it alone. On a top-k signal it sorts the kept tokens and the bucket as if it were one,
    which is approximate.
    """

    reads: ClassVar[Reads] = "pair"
    type: Literal["uld"] = "uld"
    temperature: PositiveSchedule = 1.0
    """Divides both sides' logits."""
    t_scale: Literal["auto", "none"] = "auto"
    """Whether T multiplies the distance: T, not T^2, is what keeps the gradient's size for a distance of this order."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        temperature = schedule(self.temperature)(progress)
        scale = temperature if self.t_scale == "auto" else 1.0
        return scale * (weights * uld(*_pair(signal, outputs, temperature, self.type))).sum()


class Sinkhorn(ObjectiveSettings):
    """Entropic transport of the student's tokens onto the teacher's: `T sum P_ij |p_i - q_j|_1` over the tokens it is given.

    Cui et al., arXiv:2402.17110. P is made by `iterations` scalings of `exp(-C / regularisation)`, whose rows and
    columns sum to the tokens' weights; so the sum grows with the tokens, and the train step's division by their count B
    makes the `sum P C / B` of the method. Tokens of weight 0 take no part; negative weights are a `ValueError`.

    **The geometry is `tokens_at_once`.** A token of the teacher may be matched with another token of the student, of those
    in the same call: the head hands over that many tokens of one micro-batch at a time. So, unlike every other objective
    here, value and gradient depend on that number, on how a step is split into micro-batches, and on which rows meet in
    one; they do not depend on the order within a call. More tokens to match give a smaller or equal cost per token, up to
    the regularisation, and one token at a time is the plain `|p - q|_1`. Memory of the plan grows with B^2 times the
    iterations, and time of the distances with B^2 V, per call.

    It is not 0 at p = q (a plan of finite regularisation is spread out) unless `debias` subtracts half of the cost of
    each side to itself. Then it is 0 there, may be below 0 elsewhere, and its gradient there vanishes as the scalings
    converge.
    """

    reads: ClassVar[Reads] = "pair"
    type: Literal["sinkhorn"] = "sinkhorn"
    tokens_at_once: PositiveInt = 64
    """Tokens that are matched with each other; the head hands over as many at a time."""
    temperature: PositiveSchedule = 2.0
    """Divides both sides' logits."""
    t_scale: Literal["auto", "none"] = "auto"
    """Whether T multiplies the cost, as for any distance of first order."""
    regularisation: PositiveSchedule = 0.1
    """Strength of the entropy, in units of the cost, which lies in [0, 2]."""
    iterations: PositiveInt = 20
    """Scalings of rows and columns."""
    debias: bool = False
    """Subtract half of the cost of the teacher's and of the student's tokens to themselves."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        if (weights < 0).any():
            raise ValueError("sinkhorn moves masses, and got a negative token weight")
        temperature = schedule(self.temperature)(progress)
        scale = temperature if self.t_scale == "auto" else 1.0
        live = weights > 0
        log_q, log_p = _pair(signal, outputs, temperature, self.type)
        p, masses = log_p[live].exp(), weights[live]
        q = snapped(log_q[live].exp(), p)
        if not len(masses):
            return q.sum()
        strength = schedule(self.regularisation)(progress)
        cost = transport_cost(p, q, masses, strength, self.iterations)
        if self.debias:
            own = [transport_cost(side, side, masses, strength, self.iterations) for side in (p, q)]
            cost = cost - 0.5 * (own[0] + own[1])
        return scale * cost


def _pair(signal: Signal | None, outputs: TokenLogits, temperature: float, reader: str) -> tuple[Tensor, Tensor]:
    return given(signal, "pair", reader).pair(outputs, temperature)
