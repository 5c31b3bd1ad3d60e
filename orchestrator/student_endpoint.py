"""Endpoints with the student's own network: `student`, which writes with what training publishes, and teachers that follow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.config import TransformersEndpoint
from strategies.stages.rollout import STUDENT

if TYPE_CHECKING:
    from orchestrator.config import StudentConfig
    from strategies.core import StrategyConfig

SHARED = ("model", "revision", "attention", "trust_remote_code")
"""Settings of the student that are its endpoints' too."""


def student_endpoints(student: StudentConfig, strategy: StrategyConfig) -> dict[str, TransformersEndpoint]:
    """What they are where a recipe says nothing of them."""
    shared = {name: getattr(student, name) for name in SHARED}
    return {n: TransformersEndpoint(**shared, dtype=student.dtype, follows_student=moves) for n, moves in _moving(strategy).items()}


def fill_student_endpoints(recipe: dict[str, Any], strategy: StrategyConfig, dtype: str) -> None:
    """What a recipe says of one, such as its actors, goes with the student's model; an engine that it names stands for itself.
    `dtype` is that of a student whose recipe names none."""
    endpoints, student = recipe.get("endpoints"), recipe.get("student")
    if not isinstance(endpoints, dict):
        return
    own = student if isinstance(student, dict) else {"model": student}
    shared = {key: own[key] for key in SHARED if key in own}
    for name, moves in _moving(strategy).items():
        given = endpoints.get(name)
        if isinstance(given, dict) and "engine" not in given:
            endpoints[name] = {**shared, "dtype": own.get("dtype", dtype), "follows_student": moves, **given}


def _moving(strategy: StrategyConfig) -> Mapping[str, bool]:
    """Whether its weights are published, by endpoint."""
    return {STUDENT: True, **{name: follow.moves for name, follow in strategy.build().follows.items()}}
