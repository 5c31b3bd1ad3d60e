"""Endpoints with the student's own network: who follows it, which weights they take, and what a version carries for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.versions import STUDENT_WEIGHTS, Freshness, Parcel
from strategies.stages.rollout import rollouts

if TYPE_CHECKING:
    from typing import Any

    from orchestrator.config import RunConfig
    from strategies.core import Strategy


def weight_sets(strategy: Strategy) -> dict[str, str]:
    """Name of the set of weights that an endpoint takes of every version, by endpoint that moves with the student."""
    taught = {name: name if f.averages else STUDENT_WEIGHTS for name, f in strategy.follows.items() if f.moves}
    return {**taught, **{s.endpoint: STUDENT_WEIGHTS for s in rollouts(strategy.stages) if s.follows}}


def average_rates(strategy: Strategy) -> Mapping[str, float]:
    """Rates of the moving averages that training keeps, by the name of their set."""
    return {name: f.rate for name, f in strategy.follows.items() if f.averages}


def freshness(strategy: Strategy, board: Any, lag_steps: int | None = None) -> Freshness | None:
    """How old the student may be that writes, by the versions that `board` knows; who only follows it is never older. Where nobody
    does, and the rows of a step depend on what controllers said `lag_steps` before, how old that may be. None where neither is so."""
    if not weight_sets(strategy):
        return None if lag_steps is None else Freshness(lag_steps, False, board)
    return next((Freshness(s.staleness, s.newest, board) for s in rollouts(strategy.stages) if s.follows), Freshness(0, False, board))


def versions(strategy: Strategy) -> int:
    """How many versions of the student's weights lie ready at once, that of the beginning included; 0 where nobody follows it."""
    found = freshness(strategy, None)
    return found.staleness + 2 if found else 0


def parcel(run: RunConfig) -> Parcel:
    """What every version of a run's student carries."""
    from orchestrator.published import Average

    lora, strategy = run.student.lora, run.build()
    if not weight_sets(strategy):
        return Parcel(weights=False)
    averages = {name: Average(rate) for name, rate in average_rates(strategy).items()}
    if lora is None:
        return Parcel(averages=averages)
    return Parcel(lora.alpha / lora.r, lora.publish == "adapter", averages)
