"""Who gets how much: logical CPUs, GPUs and compute threads of every process of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cluster.config import ClusterConfig, EndpointConfig, Resources

ROOMY_CPUS = 8
"""From this many CPUs on a process gets a whole logical one; below, fractions keep a stream from starving."""
READER = "reader"
"""Role of the processes that read rows."""
READER_CPUS = 0.1


@dataclass(frozen=True)
class Share:
    """What one process of a role holds."""

    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True)
class Demand:
    """Processes of one role and what each holds."""

    role: str
    processes: int
    share: Share


def machine_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def demands(
    config: ClusterConfig,
    endpoints: Mapping[str, EndpointConfig],
    workers: int,
    cpus: float,
    pools: Mapping[str, int] = MappingProxyType({}),
) -> list[Demand]:
    """Every long-lived process of a run on a machine or cluster of `cpus` logical CPUs. Compute threads are shared out among those
    that hold a network; an endpoint that only reads or waits leaves its share to them. `pools` has how many times the actors of an
    endpoint are started, where it is not once, and how many processes read."""
    actors = {name: e.actors * pools.get(name, 1) for name, e in endpoints.items()}
    busy = max(1, workers + sum(actors[name] for name, e in endpoints.items() if e.saved_model))
    threads = max(1, int(cpus) // busy)
    wanted = [Demand("worker", workers, _share(config.resources.worker, cpus, threads))]
    wanted += [Demand(name, actors[name], _share(e.resources, cpus, threads if e.saved_model else 1)) for name, e in endpoints.items()]
    reader = config.resources.reader
    cpus_of_reader = READER_CPUS if reader.cpus is None else reader.cpus
    return [*wanted, Demand(READER, pools.get(READER, 1), Share(cpus_of_reader, reader.gpus, reader.threads or 1))]


def _share(given: Resources, cpus: float, threads: int) -> Share:
    logical = given.cpus if given.cpus is not None else (1.0 if cpus >= ROOMY_CPUS else 0.5)
    return Share(logical, given.gpus, given.threads or threads)
