"""What is taught: torch, numpy and pydantic; no Ray, no files, no network.

`STRATEGIES` is the one explicit mapping from the `type` of a recipe to its settings. A package of your own adds to it
with an entry point in the group `distill.strategies`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from strategies.adakd import TokenAdaptiveKD
from strategies.core import StrategyConfig
from strategies.cross_tokenizer import ALM, GOLD, ULDStrategy
from strategies.distillm import DistiLLM
from strategies.dual_space import DSKD
from strategies.features import InnerStates, Ted
from strategies.likelihood import CrossEntropyOnly
from strategies.logits import Logits
from strategies.minillm import MiniLLM
from strategies.multi_teacher import MultiTeacher
from strategies.on_policy import GKD
from strategies.paced import Paced
from strategies.personalised import Personalised
from strategies.policy import GOPD, KDRL, OPD, RLAD
from strategies.preference import SODA
from strategies.self_distillation import OPSD, SDFT
from strategies.sequence import SeqKD, VerifiedCoT
from strategies.taid import TAID
from strategies.terms import Terms
from strategies.tsd_kd import TokenSelectiveDualKD

STRATEGIES: dict[str, type[StrategyConfig]] = {
    "adakd": TokenAdaptiveKD,
    "alm": ALM,
    "cross-entropy": CrossEntropyOnly,
    "distillm": DistiLLM,
    "dskd": DSKD,
    "filtered-layers": Ted,
    "g-opd": GOPD,
    "gkd": GKD,
    "gold": GOLD,
    "inner-states": InnerStates,
    "kdrl": KDRL,
    "logits": Logits,
    "minillm": MiniLLM,
    "multi-teacher": MultiTeacher,
    "opd": OPD,
    "opsd": OPSD,
    "paced": Paced,
    "personalised": Personalised,
    "rlad": RLAD,
    "sdft": SDFT,
    "seq-kd": SeqKD,
    "soda": SODA,
    "taid": TAID,
    "terms": Terms,
    "token-selective-dual-kd": TokenSelectiveDualKD,
    "uld": ULDStrategy,
    "verified-cot": VerifiedCoT,
}


def known_strategies() -> dict[str, type[StrategyConfig]]:
    """Built-in strategies and those of installed packages. A name given twice is a `ValueError`."""
    found = dict(STRATEGIES)
    for point in entry_points(group="distill.strategies"):
        if point.name in found:
            raise ValueError(f"the entry point {point.value!r} redefines the strategy {point.name!r}")
        found[point.name] = point.load()
    return found


def baseline() -> StrategyConfig:
    """The control of every distillation: the same student on the same rows and steps, without a teacher."""
    return CrossEntropyOnly()


__all__ = ["STRATEGIES", "StrategyConfig", "baseline", "known_strategies"]
