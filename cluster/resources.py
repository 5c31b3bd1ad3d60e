"""Who gets how much: logical CPUs, GPUs and compute threads of every process of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cluster.config import ClusterConfig, EndpointConfig, Resources

ROOMY_CPUS = 8
"""From this many CPUs on a process gets a whole logical one; below, fractions keep a stream from starving."""
FEWEST_CPUS = 0.25
"""What a process of a smaller machine holds at least; half a CPU where everybody can have that."""
READER = "reader"
"""Role of the processes that read rows."""
READER_CPUS = 0.1


@dataclass(frozen=True)
class Share:
    """What one process of a role holds."""

    cpus: float
    gpus: float
    threads: int

    def short_of(self, there: Share) -> str:
        """What `there` lacks of this, in words; nothing where it is enough."""
        kinds = (("CPUs", self.cpus, there.cpus), ("GPUs", self.gpus, there.gpus))
        return " and ".join(f"{wanted:g} {kind} of {has:g}" for kind, wanted, has in kinds if wanted > has + 1e-9)


def together(demands: Iterable[Demand]) -> Share:
    """What all processes hold."""
    held = list(demands)
    return Share(sum(d.processes * d.share.cpus for d in held), sum(d.processes * d.share.gpus for d in held), 0)


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
    reader = config.resources.reader
    reads = Demand(
        READER, pools.get(READER, 1), Share(READER_CPUS if reader.cpus is None else reader.cpus, reader.gpus, reader.threads or 1)
    )
    held = [(workers, config.resources.worker), *((actors[name], e.resources) for name, e in endpoints.items())]
    logical = _logical(cpus - reads.processes * reads.share.cpus, cpus, held)
    wanted = [Demand("worker", workers, _share(config.resources.worker, logical, threads))]
    wanted += [Demand(name, actors[name], _share(e.resources, logical, threads if e.saved_model else 1)) for name, e in endpoints.items()]
    return [*wanted, reads]


def _logical(free: float, cpus: float, held: Sequence[tuple[int, Resources]]) -> float:
    """Logical CPUs of a process that names none: a whole one of a roomy machine, else an equal part of what the others leave of `free`."""
    if cpus >= ROOMY_CPUS:
        return 1.0
    left = free - sum(processes * r.cpus for processes, r in held if r.cpus is not None)
    silent = sum(processes for processes, r in held if r.cpus is None)
    return min(0.5, max(FEWEST_CPUS, math.floor(100 * left / max(1, silent)) / 100))


def _share(given: Resources, logical: float, threads: int) -> Share:
    return Share(logical if given.cpus is None else given.cpus, given.gpus, given.threads or threads)
