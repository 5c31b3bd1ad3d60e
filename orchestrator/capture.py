"""Fills a signal store: prepared rows -> a teacher's numbers -> encoded parts, as one Ray Data job.

A part is a block: what was complete when a process died is not scored again. Parts may be written in any order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from cluster.codecs import Codec, CodecConfig, codec_for
from cluster.config import EndpointConfig
from cluster.resources import Share
from cluster.stores.files import PartInfo, Spec, StoreFiles
from cluster.stores.lease import held
from cluster.stores.parts import content_checksum, part_content
from orchestrator.bundle import from_table, scalar, to_table
from orchestrator.display import Display
from orchestrator.pipeline import add_group
from orchestrator.reading import prepared_rows
from strategies.core import Columns
from strategies.stages.score import Score

WRITERS = 2
"""Parts that are encoded and written at once, beside the teacher."""
UNTRAINED = {"step": 0, "attempt": 0, "rows_total": 0}
"""Control columns of rows that belong to no step."""

ZERO = np.zeros(1)


@dataclass(frozen=True)
class Capture:
    """One store to be filled, and who fills it."""

    files: StoreFiles
    spec: Spec
    stage: Score
    config: EndpointConfig
    codec: CodecConfig
    rows: str
    """Prepared data."""
    shares: Mapping[str, Share]
    """Of `reader` and of the endpoint."""


@dataclass(frozen=True)
class Captured:
    """What filling a store took."""

    tokens: int
    """Tokens that the teacher read now; none of them twice, and none that an earlier call had kept."""
    seconds: float
    cost: float
    """Of those tokens, where an endpoint has a price."""
    bytes_per_token: float
    """Of the whole store, a loss token."""


def capture(job: Capture, display: Display) -> Captured:
    """Fills what is missing, unless another process does; then waits for it."""
    began = time.perf_counter()
    files = job.files
    files.begin(job.spec)

    def wait(who: str) -> None:
        display.say(f"{who} fills {files.folder.root}; waiting for it.")

    with held(files.folder, wait, until=lambda: files.finished) as mine:
        fresh = _fill(job, display) if mine and not files.finished else []
    tokens, cost = sum(p.tokens for p in fresh), sum(p.cost for p in fresh)
    return Captured(tokens, time.perf_counter() - began, cost, files.bytes_per_token)


def _fill(job: Capture, display: Display) -> list[PartInfo]:
    """Scores the parts that are not there and ends the store; returns those parts."""
    there = job.files.complete_parts()
    missing = sorted(set(range(job.spec.parts)) - {p.number for p in there})
    fresh = []
    with display.scoring(job.spec.name, job.spec.parts, len(there)) as progress:
        for info in _score(job, missing):
            fresh.append(info)
            progress(info.tokens, info.seconds)
    job.files.finish(sorted([*there, *fresh], key=lambda p: p.number), facts())
    return fresh


def captured_text(job: Capture, captured: Captured) -> str:
    """What filling a store took, for a person."""
    speed = captured.tokens / captured.seconds if captured.seconds else 0.0
    cost = f" for {captured.cost:,.2f}" if captured.cost else ""
    return (
        f"Signals of {job.spec.name!r} are kept in {job.files.folder.root}: {captured.tokens:,} tokens scored now "
        f"in {captured.seconds:.1f} s ({speed:,.0f} tokens/s){cost}, {captured.bytes_per_token:.1f} bytes a token."
    )


def facts() -> dict[str, object]:
    """When a store was finished, and by which versions."""
    packages = ("torch", "transformers", "distill-orchestrator")
    return {"written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": {p: version(p) for p in packages}}


def _score(job: Capture, missing: Sequence[int]) -> Iterator[PartInfo]:
    """Every missing part, as it is complete. The stream is driven from a process of Ray's, as in training."""
    if missing:
        for answer in _drive.options(num_cpus=0, num_returns="streaming").remote(job, tuple(missing)):
            yield PartInfo(**ray.get(answer))


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]
def _drive(job: Capture, missing: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    context = DataContext.get_current()
    context.target_max_block_size = 1  # else map_batches merges blocks into one
    context.enable_progress_bars = False
    reader, key = job.shares["reader"], job.spec.key
    stream = ray.data.read_datasource(PartSource(job.rows, job.spec.starts, missing), override_num_blocks=1, num_cpus=reader.cpus)
    stream = add_group(stream, (job.stage,), job.config, job.shares[job.stage.endpoint], key.vocabulary)
    keep = Keep(job.files, job.stage.signal, codec_for(job.codec, job.stage.request, key.vocabulary))
    writers = TaskPoolStrategy(size=WRITERS)
    stream = stream.map_batches(keep, batch_size=None, batch_format="pyarrow", compute=writers, num_cpus=reader.cpus)
    for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            yield dict(row)  # `yield from` a list has no `send`, which Ray calls


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


@dataclass(frozen=True)
class Keep:
    """Encodes a scored block and writes it as a part; answers with the part's `PartInfo` as one row."""

    files: StoreFiles
    signal: str
    codec: Codec

    def __call__(self, table: pa.Table) -> pa.Table:
        columns = from_table(table)
        info, content = encoded_part(columns, self.signal, self.codec)
        self.files.keep(info, content)
        return pa.Table.from_pylist([vars(info)])


def encoded_part(columns: Columns, signal: str, codec: Codec) -> tuple[PartInfo, pa.Buffer]:
    """The part of a scored block, and its file."""
    answers = {name.removeprefix(f"{signal}/"): values for name, values in columns.items() if name.startswith(f"{signal}/")}
    dropped, seconds, cost = (float(answers.pop(name, ZERO)[0]) for name in ("dropped_mass", "seconds", "cost"))
    loss_tokens = int(np.count_nonzero(columns["loss_mask"]))
    content = part_content(columns, codec.encode(answers, loss_tokens))
    info = PartInfo(
        number=scalar(columns, "bundle"),
        rows=len(columns["lengths"]),
        loss_tokens=loss_tokens,
        tokens=len(columns["tokens"]),
        bytes=content.size,
        checksum=content_checksum(content),
        dropped_mass=dropped,
        seconds=seconds,
        cost=cost,
    )
    return info, content
