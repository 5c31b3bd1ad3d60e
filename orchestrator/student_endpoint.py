"""Endpoints with the student's own network: `student`, which writes with what training publishes; teachers that follow it; and `base`,
the network as it begins, which stays so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.config import TransformersEndpoint
from orchestrator.truncate import begins_as_saved
from strategies.stages.rollout import BASE, STUDENT

if TYPE_CHECKING:
    from orchestrator.config import StudentConfig
    from strategies.core import StrategyConfig

SHARED = ("model", "revision", "attention", "trust_remote_code")
"""Settings of the student that are its endpoints' too."""


def student_endpoints(student: StudentConfig, strategy: StrategyConfig) -> dict[str, TransformersEndpoint]:
    """What they are where a recipe says nothing of them. A student of fresh weights, or one that is cut out of a larger network,
    has no `base`: nobody saved what it began with."""
    shared = {name: getattr(student, name) for name in SHARED}
    moving = {name: moves for name, moves in _moving(strategy).items() if name != BASE or begins_as_saved(student)}
    return {n: TransformersEndpoint(**shared, dtype=student.dtype, follows_student=moves) for n, moves in moving.items()}


def fill_student_endpoints(recipe: dict[str, Any], strategy: StrategyConfig, dtype: str) -> None:
    """What a recipe says of one, such as its actors, goes with the student's model; an engine that it names stands for itself, and so
    does a model of `base`. `dtype` is that of a student whose recipe names none."""
    endpoints, student = recipe.get("endpoints"), recipe.get("student")
    if not isinstance(endpoints, dict):
        return
    own = student if isinstance(student, dict) else {"model": student}
    shared = {key: own[key] for key in SHARED if key in own}
    for name, moves in _moving(strategy).items():
        given = endpoints.get(name)
        if isinstance(given, dict) and "engine" not in given and not (name == BASE and "model" in given):
            endpoints[name] = {**shared, "dtype": own.get("dtype", dtype), "follows_student": moves, **given}


def _moving(strategy: StrategyConfig) -> Mapping[str, bool]:
    """Whether its weights are published, by endpoint."""
    return {STUDENT: True, BASE: False, **{name: follow.moves for name, follow in strategy.build().follows.items()}}
