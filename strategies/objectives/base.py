"""What objectives on token distributions share: masked sums, analytic gradients, temperature."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec

import torch
from torch import Tensor

from strategies.core import ObjectiveSettings, Progress
from strategies.head import TokenLogits
from strategies.schedule import PositiveSchedule, schedule
from strategies.signals import Signal, given

P = ParamSpec("P")
RATIO_LIMIT = 80.0
"""Where log-ratios of probabilities are cut, in nats, by divergences that have reached their bound long before."""


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """`sum w v` of `(N,)` values. A token of weight 0 adds exactly nothing, whatever its value is: also inf and NaN."""
    return (weights * torch.where(weights != 0, values, 0.0)).sum()


def analytic(rule: Callable[Concatenate[Tensor, Tensor, P], tuple[Tensor, Tensor]]) -> Callable[Concatenate[Tensor, Tensor, P], Tensor]:
    """A divergence of log q and log p, both `(N, M)`, from a rule that returns its values `(N,)` and slopes `(N, M)`.

    Slopes are derivatives with respect to log q, as if its entries were free. So no graph of `(N, M)` temporaries is
    kept, log p gets no gradient, and a token whose value is not used passes none, whatever its slopes are. No second
    derivatives.
    """

    @wraps(rule)
    def divergence(log_q: Tensor, log_p: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        values: Tensor = _Analytic.apply(log_q, log_p, lambda q, p: rule(q, p, *args, **kwargs))  # type: ignore[no-untyped-call]
        return values

    return divergence


class _Analytic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, rule: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        values, slopes = rule(log_q, log_p)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(slopes)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        by = grad_outputs[0][:, None]
        (slopes,) = ctx.saved_tensors
        return (slopes * by).masked_fill_(by == 0, 0.0), None, None


def log_ratio(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`log p - log q` within `RATIO_LIMIT`, a new `(N, M)`; 0 where both are impossible."""
    return (log_p - log_q).nan_to_num_(nan=0.0).clamp_(-RATIO_LIMIT, RATIO_LIMIT)


class Divergence(ObjectiveSettings):
    """Weighted sum over tokens of `T^o D(p_T, q_T)`, both sides tempered; a subclass gives D.

    o, the order, is the power that keeps the logit gradient's size as T grows: 2 where D is smooth
    at p = q (arXiv:1503.02531, section 2), 1 for absolute differences. `ValueError` when the signal is not one it reads.
    """

    order: ClassVar[int] = 2
    temperature: PositiveSchedule = 1.0
    """Divides both sides' logits."""
    t_scale: Literal["auto", "none"] = "auto"
    """Whether T to the divergence's order multiplies it."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        temperature = schedule(self.temperature)(progress)
        values = self.values(outputs, given(signal, self.reads, self.type), temperature, progress)
        scale = temperature**self.order if self.t_scale == "auto" else 1.0
        return scale * weighted_sum(values, weights)

    def values(self, outputs: TokenLogits, signal: Signal, temperature: float, progress: Progress) -> Tensor:
        """D of each token, `(N,)`."""
        return self.between(*signal.pair(outputs, temperature), progress)

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        """D of each token, `(N,)`, from aligned log-probabilities `(N, M)`."""
        raise NotImplementedError
