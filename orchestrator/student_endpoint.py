"""The student's own endpoints: `student`, the network in training, which writes with the weights that training publishes, and `base`,
the same network as it begins, which keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.config import TransformersEndpoint
from strategies.stages.rollout import BASE, STUDENT

if TYPE_CHECKING:
    from orchestrator.config import StudentConfig

SHARED = ("model", "revision", "attention", "trust_remote_code")
"""Settings of the student that are its endpoints' too."""


def student_endpoints(student: StudentConfig) -> dict[str, TransformersEndpoint]:
    """What they are where a recipe says nothing of them. A student of fresh weights has no `base`: nobody saved what it began with."""
    shared = {name: getattr(student, name) for name in SHARED}
    own = {STUDENT: TransformersEndpoint(**shared, dtype=student.dtype, follows_student=True)}
    return own if student.init == "random" else {**own, BASE: TransformersEndpoint(**shared, dtype=student.dtype)}


def fill_student_endpoints(recipe: dict[str, Any], dtype: str) -> None:
    """What a recipe says of them, such as their actors, goes with the student's model; an engine that it names stands for itself, and
    so does a model of `base`. `dtype` is that of a student whose recipe names none."""
    endpoints, student = recipe.get("endpoints"), recipe.get("student")
    if not isinstance(endpoints, dict):
        return
    own = student if isinstance(student, dict) else {"model": student}
    shared = {**{key: own[key] for key in SHARED if key in own}, "dtype": own.get("dtype", dtype)}
    for name, more in ((STUDENT, {"follows_student": True}), (BASE, {})):
        given = endpoints.get(name)
        if isinstance(given, dict) and "engine" not in given and not (name == BASE and "model" in given):
            endpoints[name] = {**shared, **more, **given}
