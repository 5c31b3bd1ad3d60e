"""Points of a search space: which settings a trial changes, and to what. Pure: content of recipes in, points out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from orchestrator.dotted import get, put
from orchestrator.errors import Refusal
from orchestrator.search.settings import Domain

Space = Mapping[str, Domain]
Point = dict[str, JsonValue]
"""Values by dotted path, in the order in which they are set; a path whose condition does not hold is absent."""
Content = Mapping[str, Any]
"""A recipe as it is written."""
MOST_PROBES = 200
"""Combinations that the door looks at."""


@dataclass(frozen=True)
class Probe:
    """A corner of the space: `path` at one of its ends, what it depends on at one of theirs, everything else at its first."""

    path: str
    point: Point


def ordered(space: Space) -> list[str]:
    """Paths in the order in which they are set: what lies above another first, and what a condition asks about before it.

    `Refusal` for conditions that ask in a circle.
    """
    found: list[str] = []
    while len(found) < len(space):
        ready = [p for p in space if p not in found and _needs(space, p) <= set(found)]
        if not ready:
            left = ", ".join(p for p in space if p not in found)
            raise Refusal("search.space", f"conditions that ask in a circle about {left}", "an order to choose in", "Remove one `when`.")
        found.append(ready[0])
    return found


def _needs(space: Space, path: str) -> set[str]:
    """Paths that have their values before `path` has."""
    above = {p for p in space if p != path and _within(path, p)}
    asked = {p for p in space for q in space[path].when if p != path and (_within(q, p) or _within(p, q))}
    return above | asked


def _within(path: str, above: str) -> bool:
    return path == above or path.startswith(above + ".")


def walk(space: Space, content: Content, pick: Callable[[str, Domain], JsonValue]) -> Point:
    """The point whose values `pick` gives, asked only for paths whose conditions hold."""
    here, point = copy.deepcopy(dict(content)), Point()
    for path in ordered(space):
        if _holds(space[path], here):
            point[path] = pick(path, space[path])
            _set(here, path, point[path])
    return point


def applied(content: Content, point: Mapping[str, JsonValue]) -> dict[str, Any]:
    """The recipe with a point's values; `Refusal` for an item that a list does not have."""
    here = copy.deepcopy(dict(content))
    for path, value in point.items():
        _set(here, path, value)
    return here


def _set(content: dict[str, Any], path: str, value: JsonValue) -> None:
    try:
        put(content, path.split("."), copy.deepcopy(value))
    except LookupError as error:
        do = "Correct the path."
        raise Refusal(f"search.space: {path}", str(error), "a setting or an item that is there", do) from error


def _holds(domain: Domain, content: Content) -> bool:
    return all(_is(get(content, path.split(".")), wanted) for path, wanted in domain.when.items())


def _is(found: Any, wanted: JsonValue) -> bool:
    return found in wanted if isinstance(wanted, list) else found == wanted


def extremes(domain: Domain) -> tuple[JsonValue, ...]:
    """Every value of a choice, both ends of a range."""
    return domain.choice if domain.choice is not None else domain.bounds


def probes(space: Space, content: Content) -> Iterator[Probe]:
    """Every path at each of its ends, in every combination of what it depends on; `Refusal` for a path that is never set."""
    for path in ordered(space):
        closure = _closure(space, path)
        ways = itertools.islice(itertools.product(*(extremes(space[p]) for p in closure)), MOST_PROBES)
        found = [point for way in ways if path in (point := _corner(space, content, dict(zip(closure, way, strict=True))))]
        if not found:
            asked = ", ".join(f"{p} = {v!r}" for p, v in space[path].when.items())
            do = "Correct the condition, or search what it asks about."
            raise Refusal(f"search.space: {path}", f"a condition that no trial meets ({asked})", "one that some trials meet", do)
        yield from (Probe(path, point) for point in found)


def _closure(space: Space, path: str) -> list[str]:
    """`path` and everything that it depends on."""
    wanted, known = [path], {path}
    for p in wanted:
        more = [q for q in space if q in _needs(space, p) - known]
        wanted += more
        known |= set(more)
    return wanted


def _corner(space: Space, content: Content, values: Mapping[str, JsonValue]) -> Point:
    return walk(space, content, lambda path, domain: values[path] if path in values else extremes(domain)[0])


def grid(space: Space, content: Content) -> list[Point]:
    """Every combination, the last path changing fastest; `Refusal` for a domain that cannot be counted."""
    for path, domain in space.items():
        if domain.kind not in ("choice", "integer"):
            do = "Write the values as a choice, or take another sampler."
            raise Refusal(f"search.space: {path}", f"{domain.kind} with sampler: grid", "choice or integer, which can be counted", do)
    points: list[Point] = [{}]
    for path in ordered(space):
        points = [more for point in points for more in _grown(point, path, space[path], content)]
    return points


def _grown(point: Point, path: str, domain: Domain, content: Content) -> list[Point]:
    if not _holds(domain, applied(content, point)):
        return [point]
    values = domain.choice if domain.choice is not None else range(int(domain.bounds[0]), int(domain.bounds[1]) + 1)
    return [{**point, path: value} for value in values]
