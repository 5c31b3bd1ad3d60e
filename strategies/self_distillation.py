"""Self-distillation: the student is taught by its own network, which knows more or moves more slowly."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from strategies.core import Objective, Player, Strategy, Term, lm_update
from strategies.follow import Follow
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.mixtures import JSD
from strategies.on_policy import OnPolicy
from strategies.schedule import ScheduleConfig, schedule
from strategies.sources import TakeConfig, TakeTopK, Taught
from strategies.stages.rollout import STUDENT, RowsOf
from strategies.stages.view import Context, ScoreBehind

TERM = "kd"


class SelfDistillation(OnPolicy):
    """What is common to strategies in which the student's own network scores the student's text.

    The teacher may read a context first, and its weights may stay, follow slowly, or be the student's. Held-out rows are scored
    without a context, because their completions are the references, and by the student as it began: `eval/forward_kl` says how far the
    student has moved from there, and `eval/cross_entropy` whether it got better.
    """

    teacher: str = "self"
    """Name of the teacher's endpoint; it has the student's model and settings but for what the recipe says of it."""
    context: str = ""
    """What the teacher reads before the prompt. `{reference}` stands for the data's own completion; `""` shows it nothing. Rows of
    messages are ids already, so it comes before their first turn."""
    weights: Literal["frozen", "average", "live"] = "frozen"
    """The teacher's: the student's as it began, a moving average of them, or those that wrote the text. A live teacher may collapse."""
    average_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the student that enters the average after every step: 1 - decay. 0.05 is SDPO's (arXiv:2601.20802); 0.001 is slow."""
    take: TakeConfig = TakeTopK()
    """What is asked of the teacher."""
    kd_weight: ScheduleConfig = 1.0
    """Weight of the divergence."""
    ce_weight: ScheduleConfig = 0.0
    """Weight of the cross-entropy on the data's own completions, on the rows that the student does not write."""

    @model_validator(mode="after")
    def _taught_rows(self) -> SelfDistillation:
        if self._context.shows_reference and self.student_share != 1 and self.ce_weight == 0:
            raise ValueError("expected student_share 1 or a ce_weight: rows that the student does not write have no other use here")
        if self.teacher == STUDENT and self.weights != "live":
            raise ValueError(f"expected another name than {STUDENT!r} for a teacher whose weights are {self.weights}: that one writes")
        if self.base == self.teacher:
            raise ValueError("expected another base than the teacher, such as `base`, the student as it began")
        if self.weights != "frozen" and self.take.type == "hidden":
            raise ValueError("expected another take than hidden: the output head that would read the states moves, too")
        return self

    @property
    def _context(self) -> Context:
        return Context(self.context)

    def taught_by_itself(self, objective: Objective) -> Strategy:
        """One objective on the teacher's scores of what the student wrote."""
        kd = Term(TERM, objective, schedule(self.kd_weight), signal=self.teacher)
        ce = () if self.ce_weight == 0 else (Term("ce", CrossEntropy(), schedule(self.ce_weight)),)
        score = ScoreBehind(self.teacher, self.teacher, self.take.request, TERM, self._context)
        rate = {"frozen": 0.0, "average": self.average_rate, "live": 1.0}[self.weights]
        watched, base = self.watched()
        return Strategy(
            players={"student": Player()},
            stages=(*self.writing(always=True), score, *watched, *(RowsOf(term.name, "given") for term in ce)),
            updates=(lm_update(kd, *ce),),
            signals={self.teacher: Taught(self.take, endpoint=self.teacher)},
            follows={self.teacher: Follow(rate)},
            controllers=self.controllers(),
            base=base,
        )


class OPSD(SelfDistillation):
    """The student learns from itself reading the solution: a divergence on its own text to the same network behind a reference.

    On-policy self-distillation (arXiv:2601.18734). The teacher is the student as it began, which for a LoRA student is the base
    without its adapter. Does not clip the divergence of a token, and has no reward.
    """

    type: Literal["opsd"] = "opsd"
    context: str = "Here is a correct solution:\n{reference}\n\nSolve the problem below in your own words.\n\n"
    """What the teacher reads before the prompt. `{reference}` stands for the data's own completion; `""` shows it nothing. Rows of
    messages are ids already, so it comes before their first turn."""
    sample_temperature: PositiveFloat = 1.1
    """At which the student writes."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draws from the likeliest tokens that hold this much probability."""
    sample_top_k: NonNegativeInt = 20
    """Draws from this many of the likeliest tokens; 0 from all."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the teacher in the mixture that both are compared with."""
    temperature: PositiveFloat = 1.1
    """Divides both sides' logits in the divergence."""

    def build(self) -> Strategy:
        return self.taught_by_itself(JSD(beta=self.beta, temperature=self.temperature))


class SDFT(SelfDistillation):
    """Forward KL on the student's own text to a moving average of the student, which has read a demonstration.

    Self-distillation fine-tuning (arXiv:2601.19897); the average of weights is the mean teacher's (arXiv:1703.01780, equation 1), and
    with `context: ""` nothing else teaches. Does not judge texts and has no reward.
    """

    type: Literal["sdft"] = "sdft"
    context: str = "Here is an example of a good answer:\n{reference}\n\nAnswer the question below in your own words.\n\n"
    """What the teacher reads before the prompt. `{reference}` stands for the data's own completion; `""` shows it nothing. Rows of
    messages are ids already, so it comes before their first turn."""
    weights: Literal["frozen", "average", "live"] = "average"
    """The teacher's: the student's as it began, a moving average of them, or those that wrote the text. A live teacher may collapse."""
    temperature: PositiveFloat = 1.0
    """Divides both sides' logits in the divergence."""

    def build(self) -> Strategy:
        return self.taught_by_itself(ForwardKL(temperature=self.temperature))
