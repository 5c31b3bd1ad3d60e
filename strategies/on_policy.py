"""Distillation on text that the student writes while it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from strategies.control import AdaptiveShare, Controlled, Controller
from strategies.core import Objective, Player, Sampling, ScoreRequest, Stage, Strategy, StrategyConfig, Term, TwoPass, lm_update
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.mixtures import JSD
from strategies.schedule import ScheduleConfig, Share, schedule
from strategies.sources import Take, TakeConfig, TakeTopK, Taught
from strategies.stages.replay import Replay
from strategies.stages.rollout import STUDENT, Rollout, RowsOf
from strategies.stages.score import Score

SHARE = "student_share"
"""The controller of how much the student writes."""


class StudentWrites(StrategyConfig):
    """What is common to strategies in which the student writes, whoever teaches."""

    student_share: ScheduleConfig | AdaptiveShare = 1.0
    """Share of the rows that the student writes; the others keep the data's own completions. A number, a schedule, such as
    `{steps: [[0, 0.0], [500, 1.0]]}` for a warm-up, or `{rise: 0.1}` to grow whenever the held-out loss has risen. Nobody writes
    where it is 0."""
    replay_share: Share = 0.0
    """Share of these rows that are not written anew but recalled from earlier steps."""
    replay_rows: PositiveInt = 1000
    """The newest texts that are recalled; while there are fewer, all are written anew."""
    samples: PositiveInt = 1
    """Texts for each prompt."""
    sample_temperature: PositiveFloat = 1.0
    """At which the student writes."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draws from the likeliest tokens that hold this much probability."""
    sample_top_k: NonNegativeInt = 0
    """Draws from this many of the likeliest tokens; 0 from all."""
    max_new_tokens: PositiveInt = 256
    """Longest text, in tokens."""
    prompt_tokens: PositiveInt = 32
    """Of a row without a prompt, such as plain text, the student continues so many first tokens."""
    staleness: NonNegativeInt = 0
    """Each step is written by the student of exactly so many steps before; 1 lets it write while it trains."""
    newest: bool = False
    """The newest student writes instead, at most that old: faster where steps are uneven, and not repeatable."""
    base: str | None = None
    """Name of the endpoint of the teacher's base, or of the student as it began: the student's distance from it is measured, and nothing
    is learnt from it."""

    @field_validator("base")
    @classmethod
    def _stays_as_it_is(cls, base: str | None) -> str | None:
        if base == STUDENT:
            raise ValueError(
                "expected an endpoint whose weights stay as they are; `student` is the one in training. "
                "Name its first weights: endpoints.first.model"
            )
        return base

    def rollout(self) -> Rollout:
        """The stage in which the student writes."""
        sampling = Sampling(self.samples, self.sample_temperature, self.top_p, self.sample_top_k, self.max_new_tokens)
        share = Controlled(SHARE) if isinstance(self.student_share, AdaptiveShare) else schedule(self.student_share)
        return Rollout(sampling, share, self.prompt_tokens, self.staleness, self.newest)

    def writing(self, always: bool = False) -> tuple[Stage, ...]:
        """The stages that put texts of the student in the place of the data's: recalled ones, then new ones. None where the student
        writes nothing throughout, unless `always`, for strategies that need what those stages say of every row."""
        if self.student_share == 0 and self.base is None and not always:
            return ()
        rollout = self.rollout()
        recalled = () if self.replay_share == 0 else (Replay(rollout, schedule(self.replay_share), self.replay_rows),)
        return (*recalled, rollout)

    def controllers(self) -> dict[str, Controller]:
        """What moves by the run's own metrics."""
        return {SHARE: self.student_share} if isinstance(self.student_share, AdaptiveShare) else {}

    def watched(self, *scores: Score) -> tuple[tuple[Score, ...], str | None]:
        """`scores`, and the stage that asks the base unless one of them tells its log-probabilities already; the base's signal."""
        if self.base is None:
            return scores, None
        for score in scores:
            if score.endpoint == self.base and "logprob" in score.request.answers:
                return scores, score.signal
        signal = f"{self.base}-base" if self.base in {s.signal for s in scores} else self.base
        return (*scores, Score(signal, self.base, ScoreRequest("per-token"))), signal


class OnPolicy(StudentWrites):
    """What is common to strategies in which the student writes and one teacher scores."""

    teacher: str = "teacher"
    """Name of the endpoint that scores the rows."""

    def taught(self, objective: Objective | TwoPass, take: Take, kd_weight: ScheduleConfig, ce_weight: ScheduleConfig) -> Strategy:
        """One objective on the teacher's scores of every row, and cross-entropy on the data's own completions."""
        kd = Term("kd", objective, schedule(kd_weight), signal=self.teacher)
        ce = () if ce_weight == 0 else (Term("ce", CrossEntropy(), schedule(ce_weight)),)
        writing = self.writing()
        on_given = tuple(RowsOf(term.name, "given") for term in ce if writing)
        scores, base = self.watched(Score(self.teacher, self.teacher, take.request))
        return Strategy(
            players={"student": Player()},
            stages=(*writing, *scores, *on_given),
            updates=(lm_update(kd, *ce),),
            signals={self.teacher: Taught(take, endpoint=self.teacher)},
            controllers=self.controllers(),
            base=base,
        )


class GKD(OnPolicy):
    """The generalised Jensen-Shannon divergence to the teacher on the student's own text, mixed with the data's.

    Generalised knowledge distillation (arXiv:2306.13649, algorithm 1): a share of the rows, `student_share` (its lambda), is written
    by the student, without a gradient through the sampling; the divergence counts on all rows. `beta` weighs the teacher: 0 is
    forward KL, 1 reverse KL. Has no reward term.
    """

    type: Literal["gkd"] = "gkd"
    take: TakeConfig = TakeTopK()
    """What is asked of the teacher."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the teacher in the mixture that both are compared with."""
    temperature: PositiveFloat = 1.0
    """Divides both sides' logits in the divergence."""
    kd_weight: ScheduleConfig = 1.0
    """Weight of the divergence."""
    ce_weight: ScheduleConfig = 0.0
    """Weight of the cross-entropy on the data's own completions."""

    def build(self) -> Strategy:
        return self.taught(JSD(beta=self.beta, temperature=self.temperature), self.take, self.kd_weight, self.ce_weight)
