"""Objectives: pure sums over weighted tokens. One family per file; `OBJECTIVES` is the one mapping from `type` to settings."""

from __future__ import annotations

from strategies.core import ObjectiveSettings
from strategies.objectives.divergence import AdaptiveKL, ForwardKL, Jeffreys, ReverseKL, TotalVariation
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.mixtures import JSD, AlphaDivergence, Renyi, SkewKL, SkewReverseKL
from strategies.objectives.taid import Taid

OBJECTIVES: dict[str, type[ObjectiveSettings]] = {
    "adaptive-kl": AdaptiveKL,
    "alpha": AlphaDivergence,
    "cross-entropy": CrossEntropy,
    "forward-kl": ForwardKL,
    "jeffreys": Jeffreys,
    "jsd": JSD,
    "renyi": Renyi,
    "reverse-kl": ReverseKL,
    "skew-kl": SkewKL,
    "skew-reverse-kl": SkewReverseKL,
    "taid": Taid,
    "total-variation": TotalVariation,
}

__all__ = ["OBJECTIVES"]
