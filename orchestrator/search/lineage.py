"""What the weights of a trial were trained with, step by step, and the recipe that says so. Pure."""

from __future__ import annotations

from pydantic import JsonValue

from orchestrator.search.space import Point

Legs = tuple[tuple[int, Point], ...]
"""Values by the number of finished optimizer steps from which on they hold; the first leg begins at 0."""


def grown(legs: Legs, step: int, point: Point) -> Legs:
    """`legs` up to `step` finished steps, and `point` from there on."""
    return (*((begin, values) for begin, values in legs if begin < step), (step, point))


def schedules(legs: Legs) -> Point:
    """The values with which one run does what these legs did: one that never changes as it is, others as
    `{steps: [[0, a], [200, b]]}` (`strategies.schedule.Steps`)."""
    return {path: _schedule([(begin, point[path]) for begin, point in legs]) for path in legs[0][1]}


def _schedule(values: list[tuple[int, JsonValue]]) -> JsonValue:
    changes = [values[i] for i in range(len(values)) if i == 0 or values[i][1] != values[i - 1][1]]
    return changes[0][1] if len(changes) == 1 else {"steps": [[begin, value] for begin, value in changes]}
