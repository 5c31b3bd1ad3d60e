"""A target that moves from the student to the teacher: TAID, arXiv:2501.16937."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from strategies.core import Progress, Settings
from strategies.objectives.base import Divergence, analytic
from strategies.schedule import Ramp, Share, schedule


def interpolated(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """`log softmax((1 - t) log q + t log p)`, `(N, M)`: interpolation of logits. What either side rules out stays ruled out
    for 0 < t < 1."""
    if share in (0.0, 1.0):
        return log_p if share else log_q
    mixed = torch.lerp(log_q, log_p, share)
    return mixed.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).log_softmax(-1)


@analytic
def taid(log_q: Tensor, log_p: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`-sum p_t log q` with the target p_t of `interpolated`, which carries no gradient.

    A cross-entropy, so its least value is the entropy of p_t and not 0: the pace of `taid_update` needs it so. The
    gradient is that of KL(p_t || q).
    """
    target = interpolated(log_q, log_p, share).exp()
    return -torch.where(target == 0, 0.0, target * log_q).sum(-1), target.neg_()


class Taid(Divergence):
    """Weighted sum over tokens of `-T^2 sum p_t log q_T`, `p_t = softmax(((1 - t) sg[z_q] + t z_p) / T)`: arXiv:2501.16937.

    t follows a schedule of progress here, and the paper's pace in `PacedTaid`. On a bucketed top-k the bucket is interpolated as if
    it were one token.
    """

    type: Literal["taid"] = "taid"
    progress_share: Share = Ramp(ramp=(0.3, 1.0))
    """Share t of the teacher in the target: 0 is the student itself and teaches nothing, 1 is forward KL's gradient."""

    def share(self, progress: Progress) -> float:
        """t at a step."""
        return schedule(self.progress_share)(progress)

    def between(self, log_q: Tensor, log_p: Tensor, progress: Progress) -> Tensor:
        return taid(log_q, log_p, self.share(progress))


class PacedTaid(Taid):
    """The same with the t of a controller, `TaidController`."""

    control: str
    """Name of the controller."""

    def share(self, progress: Progress) -> float:
        return progress.controls[self.control]


class TaidPace(Settings):
    """Constants of TAID's pace, with the defaults of its released code."""

    start: Annotated[float, Field(ge=0, le=1)] = 0.3
    """t before the first step."""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """t that is never passed."""
    rate: Annotated[float, Field(ge=0, le=1)] = 5e-4
    """Largest share of the way to 1 that one step may take; the paper's alpha."""
    inertia: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share of the momentum that one step keeps; the paper's beta."""


@dataclass(frozen=True)
class TaidState:
    """What the pace remembers; a checkpoint must hold it."""

    share: float
    """t of the next step."""
    loss: float | None = None
    """Mean cross-entropy form of the last step, over the whole global step; None before the first."""
    momentum: float = 0.0


def taid_update(state: TaidState, loss: float, progress: Progress, pace: TaidPace) -> TaidState:
    """The state after one optimizer step whose global loss was `loss`. The first call only remembers the loss.

    `c = (last - loss) / (last + 1e-15)`, `m <- b m + (1 - b) c`,
    `t <- min(end, max(start + (end - start) n / steps, t + a sigmoid(m) (1 - t)))`, as the released code of arXiv:2501.16937,
    which updates once per micro-batch. t never falls, and never lags behind the straight line from `start` to `end`.
    """
    line = pace.start + (pace.end - pace.start) * progress.fraction
    if state.loss is None:
        return TaidState(max(state.share, line), loss, state.momentum)
    change = (state.loss - loss) / (state.loss + 1e-15)
    momentum = pace.inertia * state.momentum + (1.0 - pace.inertia) * change
    gain = pace.rate * 0.5 * (1.0 + math.tanh(momentum / 2.0)) * (1.0 - state.share)  # a logistic that cannot overflow
    return TaidState(min(pace.end, max(line, state.share + gain)), loss, momentum)


@dataclass(frozen=True)
class TaidController:
    """`taid_update` once per optimizer step, with the loss of `term` over the whole global step: its value is t of the next one."""

    pace: TaidPace
    term: str

    @property
    def hears(self) -> frozenset[str]:
        return frozenset({f"loss/{self.term}"})

    def begin(self) -> Mapping[str, float]:
        return {"share": self.pace.start, "momentum": 0.0}

    def after_step(self, state: Mapping[str, float], metrics: Mapping[str, float], progress: Progress) -> Mapping[str, float]:
        known = TaidState(state["share"], state.get("loss"), state["momentum"])
        new = taid_update(known, metrics[f"loss/{self.term}"], progress, self.pace)
        return {"share": new.share, "momentum": new.momentum} | ({} if new.loss is None else {"loss": new.loss})

    def after_evaluation(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> Mapping[str, float]:
        return state

    def value(self, state: Mapping[str, float]) -> float:
        return state["share"]
