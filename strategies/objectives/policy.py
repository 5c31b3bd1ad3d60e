"""Policy gradients on tokens that the student wrote: one objective composed of a teacher's advantage and a verifier's.

Per token, with q the student, p the teacher, b a reference, q_old the weights that wrote the token, Â the verifier's advantage:

    A = w_R Â + w_T m d        d = clip(lambda log p + (1 - lambda) log b - log q, +-c)
    loss = -min(r A, clamp(r, 1 - low, 1 + high) A)        r = q / (q_old^a p^(1 - a))

| method | settings |
|---|---|
| sampled on-policy distillation | the defaults; `clip_ratio` where several updates share a text |
| G-OPD, ExOPD, arXiv:2602.12125 | `extrapolation` 1.25, a signal with a reference |
| KDRL, arXiv:2506.02208 | `outcome_weight` 1, `teacher_weight` falling, `teacher_form: squared`, `teacher_mask`, `clip_ratio` |
| RLAD, arXiv:2602.22495 | `outcome_weight` 1, `teacher_weight` 0, `ratio_anchor` below 1, `clip_ratio` |
| distil, then reinforce | both weights 1, `switch_after` |
| GRPO, arXiv:2402.03300, without its KL term | `outcome_weight` 1, `teacher_weight` 0, `clip_ratio` |

Everything here holds for text drawn at temperature 1, at which all log-probabilities are taken. No sum that
contains d is ever whitened: Â comes normalised, on its own, from whoever verified.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from strategies.acted import Acted, acted
from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenLogits
from strategies.objectives.base import RATIO_LIMIT, weighted_sum
from strategies.objectives.parts import advantage, student_label_logprobs, surrogate
from strategies.objectives.sampled import clipped, clipped_surrogate, importance, k2
from strategies.schedule import PositiveSchedule, ScheduleConfig, schedule
from strategies.signals import Signal

Mask = Literal["all", "wrong", "failed-group"]
LowerEdge = Annotated[float, Field(gt=0, le=1)]


def extrapolated(log_p: Tensor, log_b: Tensor, share: float) -> Tensor:
    """`share log p + (1 - share) log b`, `(N,)`: beyond 1 from the reference past the teacher, not normalised.

    A token that both rule out stays ruled out.
    """
    return (share * log_p + (1.0 - share) * log_b).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def anchored(log_old: Tensor, log_p: Tensor, share: float) -> Tensor:
    """`log q_old^share p^(1 - share)`, `(N,)`: what the ratio of a surrogate is taken to."""
    if share in (0.0, 1.0):
        return log_old if share else log_p
    return share * log_old + (1.0 - share) * log_p


def ratio_surrogate(log_q: Tensor, log_anchor: Tensor, advantages: Tensor) -> Tensor:
    """`-r A` per token, `(N,)`, r = q / anchor. At an anchor of sg[log q] its value is -A and its gradient `-A grad log q`."""
    return -(log_q - log_anchor.detach()).clamp(max=RATIO_LIMIT).exp() * advantages.detach()


class PolicyGradient(ObjectiveSettings):
    """Policy gradient on the student's own tokens, whose advantage adds a verifier's to a teacher's: OPD, G-OPD, KDRL, RLAD, GRPO.

    The formula and the settings of each method stand at the top of `objectives/policy.py`. What was decided:

    - *q of d and of r.* Without `clip_ratio` both are the student in hand under stop-gradient: r has the value 1, the gradient is
      `-sg[A] grad log q` and one update per text is assumed. With it, both q_old of r and q of d are the signal's `behaviour`, so
      that A stays the same over the updates of a text (one log-probability stands for q_old and for what the engine that wrote had).
    - *`teacher_form`.* `advantage` adds `w_T m d` to A. `squared` adds `w_T m d^2 / 2` to the loss instead, backpropagated beside
      the surrogate and never clipped by its ratio, with d of the student in hand (KDRL, arXiv:2506.02208). Both have the gradient
      `w_T m` times the reverse KL's in expectation, and are identical at q = q_old.
    - *Limits.* `clip_advantage` holds d alone, in value and gradient, so Â is never cut. `importance_cap` multiplies the whole of a
      token, surrogate and square, under stop-gradient; it refuses `clip_ratio`, whose ratio is that correction already.
    - *What is not read.* A part whose weight is 0 at a step is not computed, so the signal needs no column for it; the reference is
      read only where `extrapolation` is not 1.

    The value is the loss as written: -A where r is 1, which with the teacher alone, uncut, is k1, the unbiased estimate of
    KL(q || p). It counts the conflicts of sign between Â and d nowhere, nor the tokens that start outside of the clip range, as
    RLAD's do where `(1 - a) |d|` is above `log(1 + high)`. No entropy bonus and no KL to a reference: add terms for them.
    """

    reads: ClassVar[Reads] = "acted"
    type: Literal["policy-gradient"] = "policy-gradient"
    outcome_weight: ScheduleConfig = 0.0
    """w_R: of the verifier's advantage."""
    teacher_weight: ScheduleConfig = 1.0
    """w_T: of the teacher's advantage d, per nat."""
    switch_after: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the run before which only the teacher teaches, and from which on only the verifier does; None: both, all along."""
    teacher_mask: Mask = "all"
    """m, where the teacher teaches: `all` texts, `wrong` ones (1 - reward), or those of a `failed-group`, where none was right."""
    teacher_form: Literal["advantage", "squared"] = "advantage"
    """Whether d stands in the advantage, or its square beside the surrogate."""
    clip_advantage: PositiveSchedule | None = None
    """c: largest |d|, in nats; None leaves the estimator unbiased."""
    extrapolation: PositiveSchedule = 1.0
    """lambda: beyond 1 past the teacher, away from the reference; 1 needs no reference."""
    clip_ratio: tuple[LowerEdge, PositiveFloat] | None = None
    """How far below and above 1 the ratio to the writer may go before a token stops teaching, such as [0.2, 0.2]; None: no ratio."""
    ratio_anchor: Annotated[float, Field(ge=0, le=1)] = 1.0
    """a: share of the writer in what the ratio is taken to, the rest being the teacher's; below 1 only with `clip_ratio`."""
    importance_cap: PositiveFloat | None = None
    """Largest weight `q / behaviour` of a token that staler weights wrote, such as 2; None: no such weights."""

    @model_validator(mode="after")
    def _one_ratio(self) -> PolicyGradient:
        if self.clip_ratio is None and self.ratio_anchor != 1.0:
            raise ValueError("expected clip_ratio, such as [0.2, 0.2], beside a ratio_anchor below 1: without it there is no ratio")
        if self.clip_ratio is not None and self.importance_cap is not None:
            raise ValueError("expected clip_ratio or importance_cap, and got both: each corrects for the weights that wrote the text")
        return self

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        live = weights != 0
        acts = acted(signal, self.type).where(live)
        log_q = torch.where(live, student_label_logprobs(outputs), 0.0)
        old = log_q.detach() if self.clip_ratio is None else acts.behaviour
        if self.importance_cap is not None:
            weights = weights * importance(log_q, acts.behaviour, self.importance_cap)
        gains, pull = self._outcome(acts, progress), self._pull(acts, progress)
        if pull is None:
            return weighted_sum(self._surrogate(log_q, old, acts, gains), weights)
        if self.teacher_form == "advantage":
            return weighted_sum(self._surrogate(log_q, old, acts, gains + pull * self._gap(old, acts, pull, progress)), weights)
        d = self._gap(log_q, acts, pull, progress)
        beside = surrogate(weights * pull * k2(d), weights * pull * -d, log_q)
        return weighted_sum(self._surrogate(log_q, old, acts, gains), weights) + beside

    def _surrogate(self, log_q: Tensor, old: Tensor, acts: Acted, gains: Tensor) -> Tensor:
        """The loss of each token, `(n,)`, for advantages `(n,)`."""
        if self.clip_ratio is None:
            return ratio_surrogate(log_q, old, gains)
        anchor = old if self.ratio_anchor == 1.0 else anchored(old, acts.known("teacher", self.type), self.ratio_anchor)
        return clipped_surrogate(log_q, anchor, gains, *self.clip_ratio)

    def _outcome(self, acts: Acted, progress: Progress) -> Tensor:
        """`w_R Â` of each token, `(n,)`."""
        idle = self.switch_after is not None and progress.fraction < self.switch_after
        weight = 0.0 if idle else schedule(self.outcome_weight)(progress)
        return weight * acts.known("advantage", self.type) if weight else torch.zeros_like(acts.behaviour)

    def _pull(self, acts: Acted, progress: Progress) -> Tensor | None:
        """`w_T m` of each token, `(n,)`; None where the teacher does not teach at this step."""
        idle = self.switch_after is not None and progress.fraction >= self.switch_after
        weight = 0.0 if idle else schedule(self.teacher_weight)(progress)
        if not weight:
            return None
        if self.teacher_mask == "all":
            return torch.full_like(acts.behaviour, weight)
        wrong = 1.0 - acts.known("reward", self.type) if self.teacher_mask == "wrong" else acts.known("group_failed", self.type)
        return weight * wrong

    def _gap(self, log_q: Tensor, acts: Acted, pull: Tensor, progress: Progress) -> Tensor:
        """d of each token, `(n,)` without gradient; 0 where nothing is asked of it, whatever the teacher says."""
        target, share = acts.known("teacher", self.type), schedule(self.extrapolation)(progress)
        if share != 1.0:
            target = extrapolated(target, acts.known("reference", self.type), share)
        return clipped(torch.where(pull != 0, advantage(target, log_q), 0.0), self.clip_advantage, progress)
