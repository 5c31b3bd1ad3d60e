"""Training without a teacher: the control of every distillation, and how the quickstart makes its teacher."""

from __future__ import annotations

from typing import Literal

from strategies.core import Player, Strategy, StrategyConfig, Term, lm_update
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant


class CrossEntropyOnly(StrategyConfig):
    """Plain cross-entropy on the dataset's tokens; no teacher, no stages."""

    type: Literal["cross-entropy"] = "cross-entropy"

    def build(self) -> Strategy:
        ce = Term("ce", CrossEntropy(), constant(1.0))
        return Strategy(players={"student": Player()}, updates=(lm_update(ce),))
