"""The reader's side of the stream: walks the order and yields bundles of prepared rows.

Imports neither torch nor a strategy, because the process that reads starts with it and a run waits for its first bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from cluster.storage import Folder
from orchestrator.bundle import HELD_OUT_STEP, to_table
from orchestrator.draws import BEGINNING, CURRICULUM, cursor_columns
from orchestrator.order import Order, deal
from orchestrator.rows import Rows

if TYPE_CHECKING:
    from strategies.core import Columns


Gate = Callable[[int, int], Mapping[str, float]]
"""Given an attempt and a step, returns when the step's rows may be read, with the values of controllers that are due for it."""
CONTROL = "control/"


def _open_gate(attempt: int, step: int) -> Mapping[str, float]:
    """Nothing to wait for."""
    return {}


OPEN: Gate = _open_gate


class OrderSource(Datasource):
    """One read task that walks the order; thousands of tasks would take Ray Data minutes to plan."""

    def __init__(
        self,
        order: Order,
        start_step: int,
        attempt: int,
        with_held_out: bool,
        gate: Gate = OPEN,
        cursor: Mapping[str, float] = BEGINNING,
    ):
        self._walk = (order, start_step, attempt, with_held_out, gate, cursor)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        walk = self._walk
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(lambda: read_bundles(*walk), metadata)]


def place_of_rows(storage: str) -> str | None:
    """Ray's resource of this process's node, the only one to have prepared rows where `storage` is remote; None where all nodes do."""
    return None if Folder.of(storage).local is not None else f"node:{ray.util.get_node_ip_address()}"


def bundles_of(source: Datasource, cpus: float, at_once: int, place: str | None = None) -> ray.data.Dataset:
    """What the one task of a source yields, a block each: by itself Ray Data merges small blocks, and takes two at most of those a task has
    ready, ten times a second. Here it takes up to `at_once`. This holds for all that is done with the dataset. At a `place`, which may be
    a head node that lends no CPUs, the task asks for none."""
    context = DataContext.get_current()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context._max_num_blocks_in_streaming_gen_buffer = max(2, at_once)
    if place is None:
        return ray.data.read_datasource(source, override_num_blocks=1, num_cpus=cpus)
    return ray.data.read_datasource(source, override_num_blocks=1, num_cpus=0, ray_remote_args={"resources": {place: 0.001}})


def read_bundles(
    order: Order, start_step: int, attempt: int, with_held_out: bool, gate: Gate = OPEN, cursor: Mapping[str, float] = BEGINNING
) -> Iterator[pa.Table]:
    """One-row tables of the stream, in order, numbered from 0 within the attempt.

    Held-out rows follow the first step, so that it does not wait for them. A step's rows are read once `gate(attempt, step)` returns;
    a curriculum goes on from `cursor`, where it stood after `start_step`.
    """
    bundles = _train_bundles(order, start_step, partial(gate, attempt), cursor)
    first = list(islice(bundles, order.bundles_per_step))
    values = {name: value for name, value in first[0][1].items() if name.startswith((CONTROL, CURRICULUM))} if first else {}
    held_out = _held_out_bundles(order, values) if with_held_out else iter(())
    spare = _spare_bundles(order, values) if first else iter(())
    for number, (step, rows, total) in enumerate(chain(first, held_out, bundles, spare)):
        yield to_table(_stamped(rows, step, number, attempt, total, order.steps))


def _train_bundles(
    order: Order, start_step: int, gate: Callable[[int], Mapping[str, float]], cursor: Mapping[str, float]
) -> Iterator[tuple[int, Columns, int]]:
    """Step, rows, and rows of the whole step, for every bundle after `start_step`."""
    train = Rows(order.folder, "train")
    for step in range(start_step + 1, order.steps + 1):
        told = gate(step)
        parts, cursor = order.take(step, told, cursor)
        values = {CONTROL + name: np.asarray([value], dtype=np.float64) for name, value in told.items()} | cursor_columns(cursor)
        total = sum(len(p) for p in parts)
        yield from ((step, {**train.read(part), **values}, total) for part in parts)


def _held_out_bundles(order: Order, values: Columns) -> Iterator[tuple[int, Columns, int]]:
    """Step, rows and their number; `values` of steps stand beside them only because all bundles have the same columns."""
    first = len(Rows(order.folder, "train"))
    for part in held_out_parts(Rows(order.folder, "held_out"), order):
        yield HELD_OUT_STEP, {**prepared_rows(order.folder, part + first), **values}, len(part)


def _spare_bundles(order: Order, values: Columns) -> Iterator[tuple[int, Columns, int]]:
    """Empty ones after the last step, which nobody takes: Ray Data gives every worker as many bundles, and drops what is over. Of an
    elastic group that would be bundles of the last step."""
    nothing = Rows(order.folder, "train").read(np.zeros(0, dtype=np.int64))
    yield from ((order.steps, {**nothing, **values}, 0) for _ in range(order.bundles_per_step - 1 if order.elastic else 0))


def prepared_rows(folder: str, row_ids: NDArray[np.int64]) -> Columns:
    """Rows of one split of prepared data by their ids: held-out rows are numbered on from those to train on."""
    train = Rows(folder, "train")
    if not len(row_ids) or row_ids[0] < len(train):
        return train.read(row_ids)
    return {**Rows(folder, "held_out").read(row_ids - len(train)), "row_id": row_ids}


def held_out_parts(held_out: Rows, order: Order) -> list[NDArray[np.int64]]:
    """Rows of each held-out bundle; their number is a multiple of the bundles of a step, so that ranks share evenly."""
    per_step = order.bundles_per_step
    rows_each = max(1, (order.batch_rows or 16 * per_step) // per_step)
    rounds = -(-len(held_out) // (rows_each * per_step))
    return deal(np.arange(len(held_out)), held_out.lengths, rounds * per_step)


def _stamped(rows: Columns, step: int, number: int, attempt: int, total: int, steps: int) -> Columns:
    control = {"step": step, "bundle": number, "attempt": attempt, "rows_total": total, "steps": steps}
    return {**rows, **{name: np.asarray([value], dtype=np.int64) for name, value in control.items()}}
