"""Folds a strategy's stages into one Ray Data stream of bundles.

One Arrow row per block under `preserve_order`: worker r of W gets exactly the bundles with `number % W == r`, in order.
Nothing in Ray promises this, so workers assert it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from cluster.config import EndpointConfig
from cluster.endpoints import make_engine
from cluster.engines import Engine
from cluster.pool import Seat, Shared
from cluster.resources import READER, Share
from orchestrator.board import tell_if_restarted
from orchestrator.bundle import from_table, to_table
from orchestrator.draws import BEGINNING
from orchestrator.order import Order
from orchestrator.reading import OPEN, OrderSource, bundles_of
from orchestrator.stage_actor import Handler, StageActor, packed
from orchestrator.versions import STUDENT_WEIGHTS, FollowingEngine, Freshness
from strategies.core import Stage
from strategies.stages.rollout import STUDENT

IN_FLIGHT = 2
"""Bundles on their way to or in one actor."""


@dataclass(frozen=True)
class StreamSpec:
    """Everything the stream of one run is made of; the same for every attempt."""

    order: Order
    stages: tuple[Stage, ...]
    endpoints: Mapping[str, EndpointConfig]
    shares: Mapping[str, Share]
    """Resources by role: `reader` and every endpoint's name."""
    vocabulary: int
    """Token ids the student can be asked about; teachers drop the rest."""
    freshness: Freshness | None = None
    """How old the student may be that writes, or what the order listens to; None where neither is so."""
    weights: Mapping[str, str] = field(default_factory=lambda: {STUDENT: STUDENT_WEIGHTS})
    """Which of a version's sets of weights an endpoint's engine takes, by endpoint that follows the student."""
    foreign: Mapping[str, int] = field(default_factory=dict)
    """Token ids of endpoints that have a tokenizer of their own."""
    seats: Mapping[str, Seat] = field(default_factory=dict)
    """Places at pools that other runs ask, too, by endpoint; of others the engine is loaded in the stream's own actors."""
    place: str | None = None
    """Ray's resource of the node that has the rows; None where all have."""

    def usable(self, name: str | None) -> int:
        """Token ids that an endpoint may name."""
        return self.foreign.get(name or "", self.vocabulary)

    def followers(self, name: str | None) -> Freshness | None:
        """How an endpoint's engine follows the student; None for one that stays as it is."""
        if self.freshness is None or name is None or name not in self.weights:
            return None
        return replace(self.freshness, weights=self.weights[name])


def open_stream(
    spec: StreamSpec,
    start_step: int,
    attempt: int,
    with_held_out: bool,
    cursor: Mapping[str, float] = BEGINNING,
    board: Any = None,
) -> ray.data.Dataset:
    """The bundles after `start_step`, where a curriculum stood at `cursor`, with held-out rows if wanted. Call it in Ray Train's
    controller. The `board` is told of stages that were lost."""
    reader = spec.shares[READER]
    gate = spec.freshness.gate if spec.freshness else OPEN
    source = OrderSource(spec.order, start_step, attempt, with_held_out, gate, cursor)
    stream = bundles_of(source, reader.cpus, spec.order.bundles_per_step, spec.place)
    for group in stage_groups(spec.stages):
        name = _endpoint(group)
        config = spec.endpoints[name] if name else None
        share, seat = spec.shares[name or READER], spec.seats.get(name or "")
        make = partial(StageGroup, group, config, share.threads, spec.usable(name), spec.followers(name), seat, board)
        stream = add_group(stream, make, share, config.actors if config else 1)
    return stream


def stage_groups(stages: Sequence[Stage]) -> list[tuple[Stage, ...]]:
    """Stages that share a process: those of one endpoint in a row, those after them that need none, and those before all others."""
    groups: list[list[Stage]] = []
    for stage in stages:
        here = {s.endpoint for s in groups[-1] if s.endpoint} if groups else set()
        at_home = groups and (stage.endpoint is None or not here or stage.endpoint in here)
        if not at_home:
            groups.append([])
        groups[-1].append(stage)
    return [tuple(g) for g in groups]


def pools(stages: Sequence[Stage]) -> dict[str, int]:
    """Actor pools of the stream by role: one for every group of an endpoint's stages. The role of who reads rows has their reader, and
    a pool for stages where all of them need nobody."""
    return dict(Counter([READER, *(_endpoint(group) or READER for group in stage_groups(stages))]))


def _endpoint(group: tuple[Stage, ...]) -> str | None:
    """Who answers a group's stages; None when they need nobody."""
    return next((s.endpoint for s in group if s.endpoint), None)


def add_group(stream: ray.data.Dataset, make: Callable[[], Handler], share: Share, actors: int) -> ray.data.Dataset:
    """The stream through a pool of `actors`, in each of which `make` is called once."""
    return stream.map_batches(
        StageActor,
        fn_constructor_args=(packed(make),),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=IN_FLIGHT),
        num_cpus=share.cpus,
        num_gpus=share.gpus,
    )


class StageGroup:
    """Consecutive stages inside one actor, with the engine of their endpoint loaded once, or behind a `seat` at another's."""

    def __init__(
        self,
        stages: tuple[Stage, ...],
        config: EndpointConfig | None,
        threads: int,
        vocabulary: int,
        freshness: Freshness | None = None,
        seat: Seat | None = None,
        board: Any = None,
    ):
        tell_if_restarted(board, f"An actor of {_endpoint(stages) or 'the stages between'!r}")
        self._stages = stages
        self._engine: Engine | None = Shared(seat) if seat else None
        if config and not seat:
            self._engine = make_engine(config, vocabulary=vocabulary, threads=threads)
        self._following = FollowingEngine(self._engine, freshness) if self._engine and freshness else None

    def __call__(self, table: pa.Table) -> pa.Table:
        columns = from_table(table)
        if self._following:
            columns = self._following.follow(columns)
        for stage in self._stages:
            columns = stage(columns, self._engine if stage.endpoint else None)
        return to_table(columns)
