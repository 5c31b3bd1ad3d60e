"""DistiLLM: skewed divergences, and a share of the student's own text that grows as it is needed, most of it recalled."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from strategies.control import AdaptiveShare
from strategies.core import Strategy
from strategies.objectives.mixtures import Skew, SkewKL, SkewReverseKL
from strategies.on_policy import OnPolicy
from strategies.schedule import Ramp, ScheduleConfig, Share
from strategies.sources import TakeConfig, TakeTopK


class DistiLLM(OnPolicy):
    """The skew KL to the teacher on the data's text, and on ever more of the student's own, written anew or recalled.

    DistiLLM (arXiv:2402.03898): the student's share of the rows begins at 0 and rises by 0.1 whenever the held-out loss has risen by
    0.1; at step n of N a part n / N of that share is recalled from the newest `replay_rows` texts. Evaluations move the share, so
    `evaluate.every_steps` says how often it may. Differs from the released code: rows are drawn one by one, not a whole batch at a
    time; the first evaluation is the first that others are compared with, not one before training; there is no language-model loss
    on another corpus. Texts keep no teacher's scores: recalled rows are scored again.
    """

    type: Literal["distillm"] = "distillm"
    student_share: ScheduleConfig | AdaptiveShare = AdaptiveShare()
    """Share of the rows that the student writes or has written; the others keep the data's own completions."""
    replay_share: Share = Ramp(ramp=(0.0, 1.0))
    """Share of these rows that are not written anew but recalled from earlier steps."""
    take: TakeConfig = TakeTopK()
    """What is asked of the teacher."""
    divergence: Literal["skew-kl", "skew-reverse-kl"] = "skew-kl"
    """From the teacher to a mixture with the student, or from the student to a mixture with the teacher."""
    skew: Skew = 0.1
    """Share of the divergence's first argument in the mixture."""
    temperature: PositiveFloat = 1.0
    """Divides both sides' logits in the divergence."""
    kd_weight: ScheduleConfig = 1.0
    """Weight of the divergence."""
    ce_weight: ScheduleConfig = 0.0
    """Weight of the cross-entropy on the data's own completions."""

    def build(self) -> Strategy:
        kind = {"skew-kl": SkewKL, "skew-reverse-kl": SkewReverseKL}[self.divergence]
        return self.taught(kind(skew=self.skew, temperature=self.temperature), self.take, self.kd_weight, self.ce_weight)
