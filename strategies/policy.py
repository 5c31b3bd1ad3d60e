"""On-policy distillation by policy gradient: each token that the student wrote is rewarded by the teacher's opinion of it, by a
verifier's of the whole text, or by both."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from strategies.core import Player, ScoreRequest, Stage, Strategy, Term, lm_update
from strategies.objectives.policy import LowerEdge, Mask, PolicyGradient
from strategies.on_policy import OnPolicy
from strategies.schedule import PositiveSchedule, Ramp, ScheduleConfig, constant
from strategies.sources import TakenActions, TakeTopK, Taught
from strategies.stages.judge import GroupAdvantage, Reward
from strategies.stages.rollout import RowsOf
from strategies.stages.score import Score

ACTED = "acted"
"""The signal of what is known of written tokens."""


class Acting(OnPolicy):
    """What is common to strategies that take written tokens as actions. Text is drawn at temperature 1 from all tokens, or their
    estimates would be of something else. One number a token comes from the teacher; `top_k` more are asked for the held-out measures.
    """

    top_k: PositiveInt = 16
    """Teacher tokens kept per position, for measuring only."""

    @model_validator(mode="after")
    def _unbiased(self) -> Acting:
        if (self.sample_temperature, self.top_p, self.sample_top_k) != (1.0, 1.0, 0):
            raise ValueError("expected sample_temperature 1, top_p 1 and sample_top_k 0: the estimate holds for text drawn from all tokens")
        return self

    def acting(self, objective: PolicyGradient, reference: str | None = None, judged: tuple[Stage, ...] = ()) -> Strategy:
        """The student writes; the teacher and perhaps a reference say how likely that was, and perhaps a verifier whether it is right."""
        take = TakeTopK(top_k=self.top_k)
        asked = () if reference is None else (Score(reference, reference, ScoreRequest("per-token")),)
        scores, base = self.watched(Score(self.teacher, self.teacher, take.request), *asked)
        acted = TakenActions(teacher=self.teacher, reference=reference, outcome=bool(judged))
        return Strategy(
            players={"student": Player()},
            stages=(*self.writing(always=True), *judged, *scores, RowsOf("pg", "written")),
            updates=(lm_update(Term("pg", objective, constant(1.0), signal=ACTED)),),
            signals={self.teacher: Taught(take, endpoint=self.teacher), ACTED: acted},
            controllers=self.controllers(),
            base=base or reference,
        )


class OPD(Acting):
    """The reverse KL to the teacher as a reward: every token that the student wrote counts log p - log q, under stop-gradient.

    Sampled-token on-policy distillation: the expected gradient is that of the reverse KL of each token at
    the student's own prefixes (arXiv:2306.08543, single-step part).
    """

    type: Literal["opd"] = "opd"
    clip_advantage: PositiveSchedule | None = None
    """Largest |log p - log q| that counts, in nats; None leaves the estimator unbiased."""
    importance_cap: PositiveFloat | None = 2.0
    """Largest weight q / q_writer of a token that staler weights, or another engine, wrote; None: no such weights."""

    def objective(self) -> PolicyGradient:
        """What is told of each written token."""
        return PolicyGradient(clip_advantage=self.clip_advantage, importance_cap=self.importance_cap)

    def build(self) -> Strategy:
        return self.acting(self.objective())


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
    importance_cap: PositiveFloat | None = 5.0
    """As in `opd`; the cap on tokens of the released code."""

    def objective(self) -> PolicyGradient:
        """What is told of each written token."""
        return super().objective().model_copy(update={"extrapolation": self.extrapolation})

    def build(self) -> Strategy:
        return self.acting(self.objective(), self.reference)


class Verified(Acting):
    """What is common to strategies in which a verifier judges whole texts, each against the others of its prompt."""

    verifier: str = "verifier"
    """Name of the endpoint that judges the texts by the rows' own completions."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Texts for each prompt: a group, within which rewards are compared."""
    scale_advantage: bool = True
    """Whether a group's rewards are divided by their standard deviation."""
    clip_ratio: tuple[LowerEdge, PositiveFloat] = (0.2, 0.2)
    """How far below and above 1 the ratio to the writer may go before a token stops teaching."""

    def verified(self, objective: PolicyGradient) -> Strategy:
        """The verifier's advantages, and what the teacher thinks."""
        return self.acting(objective, judged=(Reward(self.verifier), GroupAdvantage(self.scale_advantage)))


class KDRL(Verified):
    """Reinforcement and distillation in one loss: the verifier's clipped surrogate, and the teacher's reverse KL beside it.

    arXiv:2506.02208: `-min(r A, clamp(r) A) + w (log q - log p)^2 / 2`, A the verifier's advantage within the prompt's group as in GRPO
    (arXiv:2402.03300), r = q / q_writer; the square, backpropagated, has the gradient of w times the reverse KL. With `teacher_weight`
    0 it is GRPO without a KL term; where all texts of a prompt are equally right, only the teacher teaches. The size of w is
    sensitive: an advantage is some 1, and d some nats.
    """

    type: Literal["kdrl"] = "kdrl"
    teacher_weight: ScheduleConfig = Ramp(ramp=(5e-3, 1e-3))
    """w: of the squared log-ratio to the teacher, per token."""
    outcome_weight: ScheduleConfig = 1.0
    """Of the verifier's advantage."""
    teacher_mask: Mask = "all"
    """Where the teacher teaches: `all` texts, `wrong` ones, or those of a `failed-group`, in which none was right."""
    teacher_form: Literal["squared", "advantage"] = "squared"
    """`advantage` adds w d to A instead, inside the clipped surrogate; the same at q = q_writer."""
    switch_after: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the run before which only the teacher teaches, and from which on only the verifier does; None: both, all along."""

    def build(self) -> Strategy:
        own = self.model_dump(include={"teacher_weight", "outcome_weight", "teacher_mask", "teacher_form", "switch_after", "clip_ratio"})
        return self.verified(PolicyGradient(**own))


class RLAD(Verified):
    """Reinforcement whose trust region leans to the teacher: the ratio is taken to a mean of the writer and the teacher.

    arXiv:2602.22495: GRPO's surrogate with r = q / (q_writer^a p^(1-a)). a = 1 is GRPO. Tokens with (1 - a) |log p - log q| above
    log 1.2 start outside of the clip range 0.2 and teach nothing upwards: raise a or widen `clip_ratio` for a student far from its
    teacher. Has no KL term to a reference.
    """

    type: Literal["rlad"] = "rlad"
    ratio_anchor: Annotated[float, Field(ge=0, le=1)] = 0.8
    """a: share of the writer, in logarithms, in what the ratio is taken to."""

    def build(self) -> Strategy:
        objective = PolicyGradient(outcome_weight=1.0, teacher_weight=0.0, clip_ratio=self.clip_ratio, ratio_anchor=self.ratio_anchor)
        return self.verified(objective)
