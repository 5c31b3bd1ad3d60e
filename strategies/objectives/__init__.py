"""Objectives: pure sums over weighted tokens. One family per file; `OBJECTIVES` is the one mapping from `type` to settings."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from strategies.core import ObjectiveSettings
from strategies.objectives.adakd import AdaKD, AdaKDAbsolute
from strategies.objectives.aligned import AlignedULD, SharedTokens, SpanLikelihood
from strategies.objectives.atkd import ATKD, ATKDAbsolute
from strategies.objectives.divergence import AdaptiveKL, ForwardKL, Jeffreys, ReverseKL, TotalVariation
from strategies.objectives.features import GramMatrices, HiddenStates
from strategies.objectives.filtered import FilteredLayers, FilterTask
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.mixtures import JSD, AlphaDivergence, Renyi, SkewKL, SkewReverseKL
from strategies.objectives.policy import PolicyGradient
from strategies.objectives.preference import DPO, REDI, SimPO
from strategies.objectives.relations import Relations
from strategies.objectives.sampled import ForwardKLK3, RefusedK1, ReverseKLPolicyGradient, ReverseKLRewardToGo, ReverseKLSquared
from strategies.objectives.taid import Taid
from strategies.objectives.token_weighting import SelectedTokens, SelectedTokensAbsolute
from strategies.objectives.transport import ULD, Sinkhorn
from strategies.objectives.tsd_kd import Entropy, PlackettLuce

OBJECTIVES: dict[str, type[ObjectiveSettings]] = {
    "adakd": AdaKD,
    "adakd-absolute": AdaKDAbsolute,
    "adaptive-kl": AdaptiveKL,
    "aligned-uld": AlignedULD,
    "alpha": AlphaDivergence,
    "atkd": ATKD,
    "atkd-absolute": ATKDAbsolute,
    "cross-entropy": CrossEntropy,
    "dpo": DPO,
    "entropy": Entropy,
    "filter-task": FilterTask,
    "filtered-layers": FilteredLayers,
    "forward-kl": ForwardKL,
    "forward-kl-k3": ForwardKLK3,
    "gram-matrices": GramMatrices,
    "hidden-states": HiddenStates,
    "jeffreys": Jeffreys,
    "jsd": JSD,
    "plackett-luce": PlackettLuce,
    "policy-gradient": PolicyGradient,
    "redi": REDI,
    "relations": Relations,
    "renyi": Renyi,
    "reverse-kl": ReverseKL,
    "reverse-kl-k1": RefusedK1,
    "reverse-kl-policy-gradient": ReverseKLPolicyGradient,
    "reverse-kl-reward-to-go": ReverseKLRewardToGo,
    "reverse-kl-squared": ReverseKLSquared,
    "selected-tokens": SelectedTokens,
    "selected-tokens-absolute": SelectedTokensAbsolute,
    "shared-tokens": SharedTokens,
    "simpo": SimPO,
    "sinkhorn": Sinkhorn,
    "skew-kl": SkewKL,
    "skew-reverse-kl": SkewReverseKL,
    "span-likelihood": SpanLikelihood,
    "taid": Taid,
    "total-variation": TotalVariation,
    "uld": ULD,
}

if TYPE_CHECKING:
    AnyObjective = ObjectiveSettings
else:
    AnyObjective = Annotated[reduce(or_, OBJECTIVES.values()), Field(discriminator="type")]
    """Settings of any of them, told apart by `type`."""

__all__ = ["OBJECTIVES", "AnyObjective"]
