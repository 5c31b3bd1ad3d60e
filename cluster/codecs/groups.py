"""How the ids of one token are divided by rank, and how finely each part is stored."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from cluster.config import ClusterModel


class Group(ClusterModel):
    """Ids of neighbouring ranks: stored sorted by id, each with a step on the way from the group's first log-probability down."""

    ids: PositiveInt
    bits: Annotated[int, Field(ge=0, le=16)]
    """For each id's log-probability; 0 gives all of the group the same."""


def default_groups(k: int) -> tuple[Group, ...]:
    """Few bits for many ids: beyond the first ranks an id more is worth more than a log-probability known better."""
    found: list[Group] = []
    for size, bits in ((1, 0), (7, 6), (24, 4), (k, 2)):
        left = k - sum(g.ids for g in found)
        if left > 0:
            size = min(size, left)
            found.append(Group(ids=size, bits=bits if size > 1 else 0))
    return tuple(found)
