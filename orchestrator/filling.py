"""Fills a store: prepared rows -> a teacher -> parts, as one Ray Data job. What is kept of a block is `keep`'s business.

A part is a block: what was complete when a process died is not asked again. Parts may be written in any order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.exceptions import RayError

from cluster.config import EndpointConfig
from cluster.resources import Share, demands, machine_cpus
from cluster.stores.files import PartInfo, Spec, StoreFiles
from cluster.stores.lease import held
from orchestrator.bundle import from_table, to_table
from orchestrator.config import Job
from orchestrator.display import Display
from orchestrator.errors import Interrupted, RunFailed, origin
from orchestrator.pipeline import IN_FLIGHT, StageGroup, add_group
from orchestrator.reading import bundles_of, place_of_rows, prepared_rows
from strategies.core import Columns, Stage

WRITERS = 2
"""Parts that are encoded and written at once, beside the teacher."""
UNTRAINED = {"step": 0, "attempt": 0, "rows_total": 0, "steps": 0}
"""Control columns of rows that belong to no step."""


class Keep(Protocol):
    """Makes a part of a block that went through the stage."""

    noun: ClassVar[str]
    """What a store of these parts holds."""
    verb: ClassVar[str]
    """What the teacher did with the tokens that `count` counts."""

    def __call__(self, columns: Columns) -> tuple[PartInfo, pa.Buffer]:
        """The part, and its file."""

    def count(self, info: PartInfo) -> int:
        """Tokens of a part that were the teacher's work."""


@dataclass(frozen=True)
class Filling:
    """One store to be filled, and who fills it."""

    files: StoreFiles
    spec: Spec
    stage: Stage
    config: EndpointConfig
    """Of the endpoint that answers the stage."""
    keep: Keep
    rows: str
    """Folder of prepared rows."""
    shares: Mapping[str, Share]
    """Of `reader` and of the endpoint."""
    place: str | None = None
    """Ray's resource of the node that has the rows; None where all have."""

    @classmethod
    def by(cls, job: Job, files: StoreFiles, spec: Spec, stage: Stage, keep: Keep, rows: str, tokenizer: str | None = None) -> Filling:
        """By the endpoint that the store is named after, which works alone before training. `tokenizer` is the folder of the
        student's, for an endpoint that makes ids of text and names none."""
        given = job.endpoints[spec.name]
        config = given if tokenizer is None else given.with_tokenizer(tokenizer)
        shares = {d.role: d.share for d in demands(job.cluster, {spec.name: config}, 0, machine_cpus())}
        return cls(files, spec, stage, config, keep, rows, shares, place_of_rows(job.cluster.storage))


@dataclass(frozen=True)
class Filled:
    """What filling a store took."""

    tokens: int = 0
    """Tokens that were the teacher's work now; none twice, and none that an earlier call had kept."""
    seconds: float = 0.0
    cost: float = 0.0
    """Of those tokens, where an endpoint has a price."""


def fill(job: Filling, display: Display) -> Filled:
    """Asks for what is missing, unless another process does; then waits for it."""
    began = time.perf_counter()
    files = job.files
    files.begin(job.spec)

    def wait(who: str) -> None:
        display.say(f"{who} fills {files.folder.root}; waiting for it.")

    with held(files.folder, wait, until=lambda: files.finished) as mine:
        fresh = _complete(job, display) if mine and not files.finished else []
    found = Filled(sum(map(job.keep.count, fresh)), time.perf_counter() - began, sum(p.cost for p in fresh))
    display.say(_text(job, found))
    return found


def _complete(job: Filling, display: Display) -> list[PartInfo]:
    """Makes the parts that are not there and ends the store; returns those parts."""
    there = job.files.complete_parts()
    missing = sorted(set(range(job.spec.parts)) - {p.number for p in there})
    fresh = []
    with display.asking(job.spec.name, job.spec.parts, len(there), job.keep.noun) as progress:
        for info in _parts(job, missing):
            fresh.append(info)
            progress(job.keep.count(info))
    job.files.finish(sorted([*there, *fresh], key=lambda p: p.number), _facts())
    return fresh


def _text(job: Filling, filled: Filled) -> str:
    """What filling a store took, for a person."""
    speed = filled.tokens / filled.seconds if filled.seconds else 0.0
    cost = f" for {filled.cost:,.2f}" if filled.cost else ""
    return (
        f"The {job.keep.noun} of {job.spec.name!r} lie in {job.files.folder.root}: {filled.tokens:,} tokens {job.keep.verb} now "
        f"in {filled.seconds:.1f} s ({speed:,.0f} tokens/s){cost}, {job.files.bytes_per_token:.1f} bytes a token."
    )


def _facts() -> dict[str, object]:
    """When a store was finished, and by which versions."""
    packages = ("torch", "transformers", "distill-orchestrator")
    return {"written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": {p: version(p) for p in packages}}


def _parts(job: Filling, missing: Sequence[int]) -> Iterator[PartInfo]:
    """Every missing part, as it is complete. The stream is driven from a process of Ray's, as in training."""
    kept = f"Complete parts are kept in {job.files.folder.root}, and the same command goes on with the rest."
    try:
        for answer in _drive.options(num_cpus=0, num_returns="streaming").remote(job, tuple(missing)) if missing else ():
            yield PartInfo(**ray.get(answer))
    except RayError as error:
        raise RunFailed(f"asking {job.spec.name!r} for its {job.keep.noun} failed: {origin(error)}. {kept}") from error
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped while {job.spec.name!r} was asked for its {job.keep.noun}. {kept}") from error


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]
def _drive(job: Filling, missing: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    reader = job.shares["reader"]
    stream = bundles_of(PartSource(job.rows, job.spec.starts, missing), reader.cpus, IN_FLIGHT * job.config.actors, job.place)
    share = job.shares[job.spec.name]
    make = partial(StageGroup, (job.stage,), job.config, share.threads, job.spec.key.vocabulary)
    stream = add_group(stream, make, share, job.config.actors)
    writers = TaskPoolStrategy(size=WRITERS)
    stream = stream.map_batches(
        KeepPart(job.files, job.keep), batch_size=None, batch_format="pyarrow", compute=writers, num_cpus=reader.cpus
    )
    for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            yield dict(row)  # `yield from` a list has no `send`, which Ray calls


@dataclass(frozen=True)
class KeepPart:
    """Writes a block as a part; answers with its `PartInfo` as one row."""

    files: StoreFiles
    keep: Keep

    def __call__(self, table: pa.Table) -> pa.Table:
        info, content = self.keep(from_table(table))
        self.files.keep(info, content)
        return pa.Table.from_pylist([vars(info)])


class PartSource(Datasource):
    """One read task that yields the rows of each missing part as one block."""

    def __init__(self, rows: str, starts: tuple[int, ...], missing: tuple[int, ...]):
        self._walk = (rows, starts, missing)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        walk = self._walk
        return [ReadTask(lambda: read_parts(*walk), BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))]


def read_parts(rows: str, starts: Sequence[int], missing: Sequence[int]) -> Iterator[pa.Table]:
    """One-row tables of the rows of each missing part, with the part's number as `bundle`."""
    for number in missing:
        columns = prepared_rows(rows, np.arange(starts[number], starts[number + 1]))
        control = {**UNTRAINED, "bundle": number}
        yield to_table({**columns, **{name: np.asarray([value], dtype=np.int64) for name, value in control.items()}})
