"""Checks that a run's processes fit the machine: what they have in hand at once, the memory of each, and the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from cluster.config import EndpointConfig
from cluster.resources import Demand, demands, machine_cpus
from orchestrator import following
from orchestrator.checks import machine, states
from orchestrator.checks.networks import Cast
from orchestrator.config import Job
from orchestrator.data import PreparedData
from orchestrator.memory import (
    Disk,
    Memory,
    Work,
    disk,
    following_memory,
    largest_work,
    part_work,
    published_bytes,
    scorer_memory,
    small_process,
    stream_bytes,
    surroundings,
    with_averages,
    with_frozen,
    worker_memory,
)
from orchestrator.order import Order
from orchestrator.rollouts import longest_rows, read_rows
from orchestrator.stores import Sources
from strategies.core import Strategy


def work(job: Job, strategy: Strategy, order: Order, found: Sources, added: int) -> Work:
    """The most that processes have in hand at once."""
    become, read = partial(longest_rows, strategy), partial(read_rows, strategy)
    return largest_work(job.run, order, found.answering, added, become, strategy.rows_together, read)


def on_disk(job: Job, people: Cast, data: PreparedData, order: Order, added: int) -> Disk:
    """What the run will write, after a check that it fits."""
    written = disk(job.run, people.student, data, order.steps, added)
    machine.check_disk(job.cluster.storage, written)
    return written


def fits(
    job: Job, people: Cast, work: Work, found: Sources, wanted: tuple[Demand, ...], inner: states.Inner, added: int
) -> tuple[tuple[Memory, ...], list[str]]:
    """Peak of every role's process in training, after checks that processes fit, then and while stores are filled."""
    run, strategy = job.run, job.run.build()
    moving, averages = following.weight_sets(strategy), len(following.average_rates(strategy))
    machine.check_processors(job, wanted)
    worker = with_frozen(worker_memory(run, people.student, work, wanted[0]), inner.frozen, inner.heads, inner.filters, work)
    scorers = _scorers(people, found.answering, work, wanted[1:])
    memory = (
        with_averages(worker, people.student, averages),
        *(following_memory(m, people.student) if m.role in moving else m for m in scorers),
        surroundings(published_bytes(people.student, following.versions(strategy), averages)),
    )
    heavy = machine.check_memory(job, memory, stream_bytes(run, work, wanted))
    asked = {w.spec.name: job.endpoints[w.spec.name] for w in found.captures}
    before = demands(job.cluster, asked, 0, machine_cpus())[1:]
    parts = part_work(work, asked, run.signals.part_tokens, added)
    machine.check_processors(job, before)
    machine.check_memory(job, [*_scorers(people, asked, parts, before), surroundings()], 0)
    return memory, heavy


def _scorers(people: Cast, endpoints: Mapping[str, EndpointConfig], work: Work, wanted: Sequence[Demand]) -> list[Memory]:
    """Peaks of the processes that answer, and of the reader."""
    models = {name: config.saved_model for name, config in endpoints.items()}
    found = []
    for demand in wanted:
        model = models.get(demand.role)
        found.append(scorer_memory(people.teachers[demand.role], model, work, demand) if model else small_process(demand))
    return found
