"""Distillation at the frontier of what the student can do: prompts that it sometimes solves count most."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from strategies.core import AnyTerm, Objective, Player, Strategy, Term, lm_update
from strategies.objectives.divergence import ForwardKL, ReverseKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.on_policy import OnPolicy
from strategies.schedule import ScheduleConfig, schedule
from strategies.sources import TakeConfig, TakeTopK, Taught
from strategies.stages.judge import Reward
from strategies.stages.pacing import Control, PassRateWeight
from strategies.stages.rollout import RowsOf
from strategies.stages.score import Score


class Paced(OnPolicy):
    """The teacher's divergence on the student's own texts, weighed by how often the student solves the prompt: w = pi^a (1 - pi)^b.

    PACED (arXiv:2603.11178). The pass rate is that of the very texts of a step, `samples` of each prompt, with half a pass added
    (`PassRateWeight`), so it is never older than the student that wrote them, and no table of rates is kept. Weights are divided by
    their largest value and not by their mean over an epoch: a step depends on its own rows alone, and one whose prompts are all too
    easy or too hard teaches less; the mean is a factor of the learning rate. `forward_weight` and `reverse_weight` are schedules, so
    that the forward KL may come first and the reverse one then. Prompts whose answers cannot be judged count as solved half of the time.
    """

    type: Literal["paced"] = "paced"
    verifier: str = "verifier"
    """Name of the endpoint that judges the student's texts by the data's own completions."""
    samples: Annotated[PositiveInt, Field(ge=2)] = 8
    """Texts for each prompt, of which the pass rate is taken."""
    take: TakeConfig = TakeTopK()
    """What is asked of the teacher."""
    failing_exponent: PositiveFloat = 1.0
    """a: how much prompts that the student fails are held back."""
    solved_exponent: PositiveFloat = 1.0
    """b: how much prompts that it solves are."""
    control: Control = "none"
    """`random` and `uniform` are the controls of weighing by pass rates: the same weights of a step dealt among its prompts by lot, or
    their mean for every prompt."""
    temperature: PositiveFloat = 1.0
    """Divides both sides' logits in the divergences."""
    forward_weight: ScheduleConfig = 1.0
    """Weight of the forward KL, from teacher to student."""
    reverse_weight: ScheduleConfig = 0.0
    """Weight of the reverse KL."""
    ce_weight: ScheduleConfig = 0.0
    """Weight of the cross-entropy on the data's own completions, where `student_share` is below 1."""

    def build(self) -> Strategy:
        forward, reverse = ForwardKL(temperature=self.temperature), ReverseKL(temperature=self.temperature)
        wanted: list[tuple[str, Objective, ScheduleConfig]] = [
            ("forward", forward, self.forward_weight),
            ("reverse", reverse, self.reverse_weight),
        ]
        divergences = tuple(Term(name, objective, schedule(w), signal=self.teacher) for name, objective, w in wanted if w != 0)
        ce: tuple[AnyTerm, ...] = () if self.ce_weight == 0 else (Term("ce", CrossEntropy(), schedule(self.ce_weight)),)
        pace = PassRateWeight(tuple(t.name for t in divergences), self.failing_exponent, self.solved_exponent, self.control)
        on_given = tuple(RowsOf(term.name, "given") for term in ce)
        scores, base = self.watched(Score(self.teacher, self.teacher, self.take.request))
        return Strategy(
            players={"student": Player()},
            stages=(*self.writing(always=True), *scores, Reward(self.verifier), pace, *on_given),
            updates=(lm_update(*divergences, *ce),),
            signals={self.teacher: Taught(self.take, endpoint=self.teacher)},
            controllers=self.controllers(),
            base=base,
        )
