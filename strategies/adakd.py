"""AdaKD: the hardest tokens, fewer of them as the loss falls, each at a temperature of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator

from strategies.control import AdaptiveShare
from strategies.core import Strategy
from strategies.objectives.adakd import LATF, FocusedAdaKD, LATFController, Untempered
from strategies.objectives.divergence import ReverseKL
from strategies.on_policy import OnPolicy
from strategies.schedule import PositiveSchedule, ScheduleConfig
from strategies.sources import TakeConfig, TakeTopK, temperable

CONTROL = "kept_share"
"""The controller of the share of tokens that are kept."""


class TokenAdaptiveKD(OnPolicy):
    """A divergence on the tokens that are hardest for the student, whose share follows the loss, each at its own temperature.

    LLM-oriented token-adaptive distillation (arXiv:2510.11615): after every optimizer step `latf_update` moves the kept share by the
    loss over the whole global step. Which tokens are hardest is told within each micro-batch (`objectives.adakd.AdaKD`). On the data's
    own text unless `student_share` lets the student write. The share is logged as `control/kept_share`; `loss/kd` is of the kept tokens
    alone, so runs are compared by held-out losses.
    """

    type: Literal["adakd"] = "adakd"
    student_share: ScheduleConfig | AdaptiveShare = 0.0
    """Share of the rows that the student writes; nobody writes where it is 0."""
    take: Annotated[TakeConfig, AfterValidator(temperable)] = TakeTopK()
    """What is asked of the teacher."""
    divergence: Untempered = ReverseKL()
    """What is summed over the kept tokens, at no temperature of its own; the paper's is the reverse KL."""
    focus: LATF = LATF()
    """How the kept share moves."""
    temperature: PositiveSchedule = 1.0
    """Of a token of median difficulty."""
    strength: ScheduleConfig = 0.5
    """c: temperatures lie within `temperature` times exp(-c) and exp(c), hard tokens the colder."""
    kd_weight: ScheduleConfig = 1.0
    """Weight of the divergence."""
    ce_weight: ScheduleConfig = 0.0
    """Weight of the cross-entropy on the data's own completions."""

    def build(self) -> Strategy:
        objective = FocusedAdaKD(control=CONTROL, divergence=self.divergence, temperature=self.temperature, strength=self.strength)
        taught = self.taught(objective, self.take, self.kd_weight, self.ce_weight)
        return replace(taught, controllers={**taught.controllers, CONTROL: LATFController(self.focus, "kd")})
