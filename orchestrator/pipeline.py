"""Folds a strategy's stages into one Ray Data stream of bundles.

One Arrow row per block under `preserve_order`: worker r of W gets exactly the bundles with `number % W == r`, in order.
Nothing in Ray promises this, so workers assert it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from cluster.config import EndpointConfig
from cluster.endpoints import make_engine
from cluster.resources import Share
from orchestrator.bundle import HELD_OUT_STEP, from_table, to_table
from orchestrator.order import Order, deal, steps_from
from orchestrator.rows import Rows
from strategies.core import Columns, Stage


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


def open_stream(spec: StreamSpec, start_step: int, attempt: int, with_held_out: bool) -> ray.data.Dataset:
    """The bundles after `start_step`, held-out rows first if wanted. Call it in Ray Train's controller."""
    context = DataContext.get_current()
    context.target_max_block_size = 1  # else map_batches merges bundles into one block
    context.enable_progress_bars = False
    reader = spec.shares["reader"]
    source = _OrderSource(spec.order, start_step, attempt, with_held_out)
    stream = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=reader.cpus)
    for group in stage_groups(spec.stages):
        name = next((s.endpoint for s in group if s.endpoint), None)
        stream = _add_group(stream, group, name, spec)
    return stream


def stage_groups(stages: Sequence[Stage]) -> list[tuple[Stage, ...]]:
    """Stages that share a process: an endpoint's stage and those after it that need none."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if not groups or stage.endpoint is not None:
            groups.append([])
        groups[-1].append(stage)
    return [tuple(g) for g in groups]


def _add_group(stream: ray.data.Dataset, group: tuple[Stage, ...], endpoint: str | None, spec: StreamSpec) -> ray.data.Dataset:
    share = spec.shares[endpoint or "reader"]
    config = spec.endpoints[endpoint] if endpoint else None
    return stream.map_batches(
        StageGroup,
        fn_constructor_args=(group, config, share.threads, spec.vocabulary),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.actors if config else 1, max_tasks_in_flight_per_actor=2),
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(share.threads)}},
    )


class StageGroup:
    """Consecutive stages inside one actor, with the engine of their endpoint loaded once."""

    def __init__(self, stages: tuple[Stage, ...], config: EndpointConfig | None, threads: int, vocabulary: int):
        self._stages = stages
        self._engine = make_engine(config, vocabulary=vocabulary, threads=threads) if config else None

    def __call__(self, table: pa.Table) -> pa.Table:
        columns = from_table(table)
        for stage in self._stages:
            columns = stage(columns, self._engine if stage.endpoint else None)
        return to_table(columns)


class _OrderSource(Datasource):
    """One read task that walks the order; thousands of tasks would take Ray Data minutes to plan."""

    def __init__(self, order: Order, start_step: int, attempt: int, with_held_out: bool):
        self._walk = (order, start_step, attempt, with_held_out)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        walk = self._walk
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(lambda: read_bundles(*walk), metadata)]


def read_bundles(order: Order, start_step: int, attempt: int, with_held_out: bool) -> Iterator[pa.Table]:
    """One-row tables of the stream, in order, numbered from 0 within the attempt."""
    number = 0
    if with_held_out:
        held_out = Rows(order.folder, "held_out")
        for part in held_out_parts(held_out, order):
            yield to_table(_stamped(held_out.read(part), HELD_OUT_STEP, number, attempt, len(part)))
            number += 1
    train = Rows(order.folder, "train")
    for step, parts in steps_from(order, start_step):
        total = sum(len(p) for p in parts)
        for part in parts:
            yield to_table(_stamped(train.read(part), step, number, attempt, total))
            number += 1


def held_out_parts(held_out: Rows, order: Order) -> list[NDArray[np.int64]]:
    """Rows of each held-out bundle; their number is a multiple of the bundles of a step, so that ranks share evenly."""
    per_step = order.bundles_per_step
    rows_each = max(1, (order.batch_rows or 16 * per_step) // per_step)
    rounds = -(-len(held_out) // (rows_each * per_step))
    return deal(np.arange(len(held_out)), held_out.lengths, rounds * per_step)


def _stamped(rows: Columns, step: int, number: int, attempt: int, total: int) -> Columns:
    control = {"step": step, "bundle": number, "attempt": attempt, "rows_total": total}
    return {**rows, **{name: np.asarray([value], dtype=np.int64) for name, value in control.items()}}
