"""Personalised distillation: the teacher mends what the student gets wrong, and the student learns what was mended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from strategies.core import Player, Sampling, Strategy, Term, lm_update
from strategies.objectives.likelihood import CrossEntropy
from strategies.on_policy import OnPolicy
from strategies.schedule import constant
from strategies.stages.judge import Reward
from strategies.stages.repair import Lessons, Repair, Variant


class Personalised(OnPolicy):
    """Cross-entropy on the teacher's repairs of the student's own failed attempts, where a verifier finds the repair right.

    Personalised distillation (arXiv:2310.18628): each step the student attempts its prompts; attempts that pass teach nothing, those
    that fail go to the teacher, prompt and attempt and `feedback`, and what it writes is judged again. Feedback is the user's next turn
    in a chat, and stands right behind the attempt elsewhere. The teacher may be any endpoint that writes with the student's tokens, and
    no probabilities are asked of it. A student without faults learns nothing: such a step has no rows. Logs how many attempts failed and
    how many of them were repaired (`repair/...`). The teacher is told that an attempt is wrong, and not what a test printed.
    """

    type: Literal["personalised"] = "personalised"
    teacher: str = "teacher"
    """Name of the endpoint that repairs."""
    verifier: str = "verifier"
    """Name of the endpoint that judges attempts and repairs by the data's own completions."""
    base: None = None
    """Not measured: what is learnt are the teacher's words, not the student's."""
    replay_share: Literal[0] = 0
    """Nothing is recalled: of a repair nobody keeps the attempt."""
    sample_temperature: PositiveFloat = 0.3
    """At which the student writes."""
    teacher_temperature: NonNegativeFloat = 0.0
    """At which the teacher writes; 0 writes the likeliest token each time."""
    variant: Variant = "direct"
    """`direct` learns the repair from the prompt, `refine` from prompt, attempt and feedback, `combine` both."""
    feedback: Annotated[str, Field(min_length=1)] = "\n\nThe answer above is wrong. A correct one:\n"
    """What the teacher, and with `refine` the student, is told of a wrong attempt; in a chat without the white space around it."""
    most_changed: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest share of a repair's tokens that may not be the attempt's, such as 0.9: beyond, the teacher has mended nothing, but answered
    by itself."""

    def build(self) -> Strategy:
        sampling = Sampling(1, self.teacher_temperature, max_new_tokens=self.max_new_tokens)
        judge = Reward(self.verifier)
        mend = (Repair(self.teacher, sampling, self.feedback), judge, Lessons(self.variant, self.most_changed))
        return Strategy(
            players={"student": Player()},
            stages=(*self.writing(always=True), judge, *mend),
            updates=(lm_update(Term("ce", CrossEntropy(), constant(1.0))),),
            controllers=self.controllers(),
        )
