"""Teachers that answer live, loaded once for all trials of a search: which, what they hold, and what a trial's plan is with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import EndpointConfig
from cluster.pool import Seat, close_pool, open_pool
from cluster.resources import READER_CPUS, Demand, Share
from orchestrator.following import weight_sets
from orchestrator.memory import Memory, small_process
from orchestrator.plan import Plan
from orchestrator.stores import LIVE

CLIENT = Share(READER_CPUS, 0.0, 1)
"""Of a trial's process that waits for a pool."""


@dataclass(frozen=True)
class Pooled:
    """A teacher that all trials ask in turns."""

    name: str
    config: EndpointConfig
    vocabulary: int
    """Token ids that it may name."""
    demand: Demand
    """Its actors, of the whole search."""
    memory: Memory


def pooled(plans: Sequence[Plan]) -> tuple[Pooled, ...]:
    """Teachers that load a model, stay as they are, and are one and the same wherever a trial asks them live."""
    found: dict[str, list[Pooled]] = {}
    for plan in plans:
        for name in _live(plan):
            found.setdefault(name, []).append(_of(plan, name))
    same = [here for _, here in sorted(found.items()) if all(_alike(t, here[0]) for t in here)]
    return tuple(max(here, key=lambda t: t.memory.host) for here in same)


def _alike(one: Pooled, other: Pooled) -> bool:
    """Whether one engine answers for both; how much it has in hand may differ."""
    return (one.config, one.vocabulary) == (other.config, other.vocabulary)


def _live(plan: Plan) -> Iterator[str]:
    moving = weight_sets(plan.strategy)
    for name, digest in plan.sources.digests.items():
        if digest == LIVE and name not in moving and plan.sources.answering[name].saved_model:
            yield name


def _of(plan: Plan, name: str) -> Pooled:
    config, vocabulary = plan.sources.answering[name], plan.stream().usable(name)
    memory = next(m for m in plan.memory if m.role == name)
    share = next(d.share for d in plan.demands if d.role == name)
    return Pooled(name, config, vocabulary, Demand(name, config.actors, share), replace(memory, processes=config.actors))


def seated(plan: Plan, teachers: Collection[str], search: str, at_once: int) -> Plan:
    """The plan of one of `at_once` trials that asks these teachers of the search's pools, and holds nothing of them itself; of others it
    takes its share."""
    here = {name: Seat(pool_name(search, name), plan.name) for name in teachers if name in set(_live(plan))}
    demands = tuple(replace(d, share=CLIENT) if d.role in here else d for d in plan.demands)
    clients = {d.role: small_process(d) for d in demands if d.role in here}
    answering = {name: config.shared_by(at_once) for name, config in plan.sources.answering.items()}
    sources = replace(plan.sources, answering=answering)
    return replace(plan, sources=sources, seats=here, demands=demands, memory=tuple(clients.get(m.role, m) for m in plan.memory))


def pool_name(search: str, teacher: str) -> str:
    """Of the actor at which a search's trials ask a teacher."""
    return f"{search}/{teacher}"


@contextmanager
def pools(search: str, teachers: Sequence[Pooled]) -> Iterator[Mapping[str, list[Any]]]:
    """Around the trials: pools are there, and end with them, however those end."""
    opened: dict[str, list[Any]] = {}
    try:
        for t in teachers:
            opened[t.name] = open_pool(pool_name(search, t.name), t.config, t.vocabulary, t.demand.share)
        yield opened
    finally:
        for actors in opened.values():
            close_pool(actors)
