"""Distillation from teacher distributions on given text (off-policy)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from strategies.core import Player, Strategy, StrategyConfig, Term, lm_update
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import PositiveSchedule, ScheduleConfig, schedule
from strategies.sources import TakeTopK, Taught
from strategies.stages.score import Score


class Logits(StrategyConfig):
    """Match the teacher's next-token distribution on the dataset's own text, beside cross-entropy.

    Forward KL on the teacher's top-k tokens plus one bucket for the rest: word-level distillation of Kim & Rush
    (arXiv:1606.07947, section 3.1) with the temperature of Hinton et al. (arXiv:1503.02531, eq. 1). Teacher and
    student must share a tokenizer. Does not sample from anybody.
    """

    type: Literal["logits"] = "logits"
    teacher: str = "teacher"
    """Name of the endpoint that scores the rows."""
    top_k: PositiveInt = 64
    """Teacher tokens kept per position; the rest become one bucket."""
    temperature: PositiveSchedule = 1.0
    """Divides both sides' logits in the KL term; its T^2 keeps the gradient's size."""
    kd_weight: ScheduleConfig = 0.9
    """Weight of the forward KL."""
    ce_weight: ScheduleConfig = 0.1
    """Weight of the cross-entropy on the dataset's tokens."""

    def build(self) -> Strategy:
        take = TakeTopK(top_k=self.top_k)
        kd = Term("kd", ForwardKL(temperature=self.temperature), schedule(self.kd_weight), signal=self.teacher)
        ce = Term("ce", CrossEntropy(), schedule(self.ce_weight))
        return Strategy(
            players={"student": Player()},
            stages=(Score(self.teacher, self.teacher, take.request),),
            updates=(lm_update(kd, ce),),
            signals={self.teacher: Taught(take, endpoint=self.teacher)},
        )
