"""The endpoint `student`: the network in training, as an engine that writes with the weights that training publishes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.config import TransformersEndpoint
from strategies.stages.rollout import STUDENT

if TYPE_CHECKING:
    from orchestrator.config import StudentConfig

SHARED = ("model", "revision", "attention", "trust_remote_code")
"""Settings of the student that are its endpoint's too."""


def student_endpoint(student: StudentConfig) -> TransformersEndpoint:
    """What it is where a recipe says nothing of it."""
    shared = {name: getattr(student, name) for name in SHARED}
    return TransformersEndpoint(**shared, dtype=student.dtype, follows_student=True)


def fill_student_endpoint(recipe: dict[str, Any], dtype: str) -> None:
    """What a recipe says of it, such as its actors, goes with the student's model; an engine that it names stands for itself.
    `dtype` is that of a student whose recipe names none."""
    endpoints, student = recipe.get("endpoints"), recipe.get("student")
    given = endpoints.get(STUDENT) if isinstance(endpoints, dict) else None
    if not isinstance(endpoints, dict) or not isinstance(given, dict) or "engine" in given:
        return
    own = student if isinstance(student, dict) else {"model": student}
    shared = {key: own[key] for key in SHARED if key in own}
    endpoints[STUDENT] = {**shared, "dtype": own.get("dtype", dtype), "follows_student": True, **given}
