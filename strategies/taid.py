"""TAID: a target that moves from the student to the teacher as fast as the student follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import PositiveFloat

from strategies.control import AdaptiveShare
from strategies.core import Strategy
from strategies.objectives.taid import PacedTaid, TaidController, TaidPace
from strategies.on_policy import OnPolicy
from strategies.schedule import ScheduleConfig
from strategies.sources import TakeConfig, TakeTopK

CONTROL = "taid"
"""The controller of the teacher's share in the target."""


class TAID(OnPolicy):
    """Cross-entropy to a target between student and teacher, whose share in it grows with the progress that the loss shows.

    Temporally adaptive interpolated distillation (arXiv:2501.16937): after every optimizer step `taid_update` moves t by the loss over
    the whole global step, where the released code moves it with every micro-batch. On the data's own text, as in the paper, unless
    `student_share` lets the student write. t is logged as `control/taid`.
    """

    type: Literal["taid"] = "taid"
    student_share: ScheduleConfig | AdaptiveShare = 0.0
    """Share of the rows that the student writes; nobody writes where it is 0."""
    take: TakeConfig = TakeTopK()
    """What is asked of the teacher."""
    pace: TaidPace = TaidPace()
    """How t moves."""
    temperature: PositiveFloat = 1.0
    """Divides both sides' logits."""
    kd_weight: ScheduleConfig = 1.0
    """Weight of the cross-entropy to the target."""
    ce_weight: ScheduleConfig = 0.0
    """Weight of the cross-entropy on the data's own completions."""

    def build(self) -> Strategy:
        objective = PacedTaid(control=CONTROL, temperature=self.temperature)
        taught = self.taught(objective, self.take, self.kd_weight, self.ce_weight)
        return replace(taught, controllers={**taught.controllers, CONTROL: TaidController(self.pace, "kd")})
