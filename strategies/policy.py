"""On-policy distillation by policy gradient: each token that the student wrote is rewarded by the teacher's opinion of it."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from strategies.core import Player, ScoreRequest, Strategy, Term, lm_update
from strategies.objectives.policy import PolicyGradient
from strategies.on_policy import OnPolicy
from strategies.schedule import PositiveSchedule, constant
from strategies.sources import TakenActions, TakeTopK, Taught
from strategies.stages.rollout import RowsOf
from strategies.stages.score import Score

ACTED = "acted"
"""The signal of what is known of written tokens."""


class OPD(OnPolicy):
    """The reverse KL to the teacher as a reward: every token that the student wrote counts log p - log q, under stop-gradient.

    Sampled-token on-policy distillation (strategies book, `opd-pg`): the expected gradient is that of the reverse KL of each token at
    the student's own prefixes (arXiv:2306.08543, single-step part). One number a token comes from the teacher; `top_k` more are asked
    for the held-out measures. Text is drawn at temperature 1 from all tokens, or the estimate would be of something else.
    """

    type: Literal["opd"] = "opd"
    top_k: PositiveInt = 16
    """Teacher tokens kept per position, for measuring only."""
    clip_advantage: PositiveSchedule | None = None
    """Largest |log p - log q| that counts, in nats; None leaves the estimator unbiased."""
    importance_cap: PositiveFloat | None = None
    """Largest weight q / q_writer of a token that staler weights wrote, such as 2; None: no such weights."""

    @model_validator(mode="after")
    def _unbiased(self) -> OPD:
        if (self.sample_temperature, self.top_p, self.sample_top_k) != (1.0, 1.0, 0):
            raise ValueError("expected sample_temperature 1, top_p 1 and sample_top_k 0: the estimate holds for text drawn from all tokens")
        return self

    def objective(self) -> PolicyGradient:
        """What is told of each written token."""
        return PolicyGradient(clip_advantage=self.clip_advantage, importance_cap=self.importance_cap)

    def build(self) -> Strategy:
        return self.acting(self.objective(), reference=None)

    def acting(self, objective: PolicyGradient, reference: str | None) -> Strategy:
        """The student writes, the teacher and perhaps a reference say how likely that was."""
        take = TakeTopK(top_k=self.top_k)
        asked = () if reference is None else (Score(reference, reference, ScoreRequest("per-token")),)
        scores, base = self.watched(Score(self.teacher, self.teacher, take.request), *asked)
        return Strategy(
            players={"student": Player()},
            stages=(self.rollout(), *scores, RowsOf("pg", "written")),
            updates=(lm_update(Term("pg", objective, constant(1.0), signal=ACTED)),),
            signals={self.teacher: Taught(take, endpoint=self.teacher), ACTED: TakenActions(teacher=self.teacher, reference=reference)},
            base=base or reference,
        )


class GOPD(OPD):
    """On-policy distillation past the teacher: the reward log p - log b, from a base to the teacher, is extrapolated.

    Generalised on-policy distillation (arXiv:2602.12125): the advantage is `l (log p - log b) - (log q - log b)`, whose optimum is
    p^l b^(1-l) renormalised. `extrapolation` l above 1 goes on beyond the teacher, its mistakes included; 1 is `opd`.
    """

    type: Literal["g-opd"] = "g-opd"  # type: ignore[assignment]
    reference: str = "base"
    """Name of the endpoint of the base: the student as it began, or what the teacher was before it learnt the task."""
    extrapolation: PositiveSchedule = 1.25
    """l: how far along the way from the base to the teacher."""

    def objective(self) -> PolicyGradient:
        """What is told of each written token."""
        return super().objective().model_copy(update={"extrapolation": self.extrapolation})

    def build(self) -> Strategy:
        return self.acting(self.objective(), self.reference)
