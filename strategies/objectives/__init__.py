"""Objectives: pure sums over weighted tokens. One family per file; `OBJECTIVES` is the one mapping from `type` to settings."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from strategies.core import ObjectiveSettings
from strategies.objectives.divergence import AdaptiveKL, ForwardKL, Jeffreys, ReverseKL, TotalVariation
from strategies.objectives.features import GramMatrices, HiddenStates
from strategies.objectives.filtered import FilteredLayers, FilterTask
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.mixtures import JSD, AlphaDivergence, Renyi, SkewKL, SkewReverseKL
from strategies.objectives.relations import Relations
from strategies.objectives.taid import Taid

OBJECTIVES: dict[str, type[ObjectiveSettings]] = {
    "adaptive-kl": AdaptiveKL,
    "alpha": AlphaDivergence,
    "cross-entropy": CrossEntropy,
    "filter-task": FilterTask,
    "filtered-layers": FilteredLayers,
    "forward-kl": ForwardKL,
    "gram-matrices": GramMatrices,
    "hidden-states": HiddenStates,
    "jeffreys": Jeffreys,
    "jsd": JSD,
    "relations": Relations,
    "renyi": Renyi,
    "reverse-kl": ReverseKL,
    "skew-kl": SkewKL,
    "skew-reverse-kl": SkewReverseKL,
    "taid": Taid,
    "total-variation": TotalVariation,
}

if TYPE_CHECKING:
    AnyObjective = ObjectiveSettings
else:
    AnyObjective = Annotated[reduce(or_, OBJECTIVES.values()), Field(discriminator="type")]
    """Settings of any of them, told apart by `type`."""

__all__ = ["OBJECTIVES", "AnyObjective"]
