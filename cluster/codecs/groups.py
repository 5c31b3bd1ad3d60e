"""How the ids of one token are divided by rank, and how finely each part is stored."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from cluster.config import ClusterModel


class Group(ClusterModel):
    """Ids of neighbouring ranks: stored sorted by id, each with a step on the way from the group's first log-probability down."""

    ids: PositiveInt
    """How many neighbouring ranks."""
    bits: Annotated[int, Field(ge=0, le=16)]
    """For each id's log-probability; 0 gives all of the group the same."""


LEAN_BELOW, WIDEST = 56, 256
"""Ids below which a token costs some 100 bytes, and the gradient of its first ranks is stored less finely for more ids; ids from
which the last ranks are divided once more, as their log-probabilities would spread too far for two bits."""


def default_groups(k: int) -> tuple[Group, ...]:
    """What measured best of k ids (`python -m tests.benchmarks codec-300`): the first of its own, then fewer bits for more ids.

    Beyond the first ranks an id more tells more than a log-probability known better; on the first ranks the gradient is made.
    """
    fine = ((1, 0), (7, 9), (24, 5), (k if k < WIDEST else 160, 2), (k, 2))
    found: list[Group] = []
    for size, bits in ((1, 0), (9, 6), (k, 1)) if k < LEAN_BELOW else fine:
        own = min(size, k - sum(g.ids for g in found))
        if own > 0:
            found.append(Group(ids=own, bits=bits if own > 1 else 0))
    return tuple(found)
