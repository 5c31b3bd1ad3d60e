"""Fills a text store: prompts -> a teacher's texts -> parts, as one Ray Data job. What is complete is not written again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, TaskPoolStrategy

from cluster.config import EndpointConfig
from cluster.endpoints import check_written
from cluster.resources import Share
from cluster.stores.files import PartInfo, Spec, StoreFiles
from cluster.stores.lease import held
from cluster.stores.parts import content_checksum
from cluster.stores.texts import texts_content
from orchestrator.bundle import from_table, scalar
from orchestrator.capture import WRITERS, Captured, PartSource, facts
from orchestrator.display import Display
from orchestrator.pipeline import add_group
from strategies.core import Columns
from strategies.stages.write import Write


@dataclass(frozen=True)
class Writing:
    """One text store to be filled, and who writes."""

    files: StoreFiles
    spec: Spec
    stage: Write
    config: EndpointConfig
    prompts: str
    """Folder of prepared prompts."""
    shares: Mapping[str, Share]
    """Of `reader` and of the endpoint."""


def author(job: Writing, display: Display) -> Captured:
    """Writes what is missing, unless another process does; then waits for it."""
    began = time.perf_counter()
    files = job.files
    files.begin(job.spec)

    def wait(who: str) -> None:
        display.say(f"{who} fills {files.folder.root}; waiting for it.")

    with held(files.folder, wait, until=lambda: files.finished) as mine:
        fresh = _fill(job, display) if mine and not files.finished else []
    return Captured(sum(p.loss_tokens for p in fresh), time.perf_counter() - began, 0.0, files.bytes_per_token)


def authored_text(job: Writing, written: Captured) -> str:
    """What filling a store took, for a person."""
    speed = written.tokens / written.seconds if written.seconds else 0.0
    return (
        f"Text of {job.spec.name!r} is kept in {job.files.folder.root}: {written.tokens:,} tokens written now "
        f"in {written.seconds:.1f} s ({speed:,.0f} tokens/s)."
    )


def _fill(job: Writing, display: Display) -> list[PartInfo]:
    there = job.files.complete_parts()
    missing = sorted(set(range(job.spec.parts)) - {p.number for p in there})
    fresh = []
    with display.scoring(job.spec.name, job.spec.parts, len(there), "texts") as progress:
        for info in _write(job, missing):
            fresh.append(info)
            progress(info.loss_tokens, info.seconds)
    job.files.finish(sorted([*there, *fresh], key=lambda p: p.number), facts())
    return fresh


def _write(job: Writing, missing: Sequence[int]) -> Iterator[PartInfo]:
    """Every missing part, as it is complete."""
    if missing:
        for answer in _drive.options(num_cpus=0, num_returns="streaming").remote(job, tuple(missing)):
            yield PartInfo(**ray.get(answer))


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]
def _drive(job: Writing, missing: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    context = DataContext.get_current()
    context.target_max_block_size = 1  # else map_batches merges blocks into one
    context.enable_progress_bars = False
    reader, key = job.shares["reader"], job.spec.key
    stream = ray.data.read_datasource(PartSource(job.prompts, job.spec.starts, missing), override_num_blocks=1, num_cpus=reader.cpus)
    stream = add_group(stream, (job.stage,), job.config, job.shares[job.stage.endpoint], key.vocabulary)
    keep = KeepTexts(job.files, job.stage.sampling.samples, key.vocabulary)
    writers = TaskPoolStrategy(size=WRITERS)
    stream = stream.map_batches(keep, batch_size=None, batch_format="pyarrow", compute=writers, num_cpus=reader.cpus)
    for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            yield dict(row)  # `yield from` a list has no `send`, which Ray calls


@dataclass(frozen=True)
class KeepTexts:
    """Writes what was written for a block of prompts as a part; answers with the part's `PartInfo` as one row."""

    files: StoreFiles
    samples: int
    vocabulary: int

    def __call__(self, table: pa.Table) -> pa.Table:
        info, content = texts_part(from_table(table), self.samples, self.vocabulary)
        self.files.keep(info, content)
        return pa.Table.from_pylist([vars(info)])


def texts_part(columns: Columns, samples: int, vocabulary: int) -> tuple[PartInfo, pa.Buffer]:
    """The part of a block that went through `Write`, and its file. `loss_tokens` are those written, `tokens` those read too."""
    written = {name.removeprefix("written/"): values for name, values in columns.items() if name.startswith("written/")}
    check_written(columns, written, samples, vocabulary)
    content = texts_content(written)
    tokens = len(written["tokens"])
    info = PartInfo(
        number=scalar(columns, "bundle"),
        rows=len(columns["lengths"]),
        loss_tokens=tokens,
        tokens=tokens + samples * int(np.sum(columns["lengths"])),
        bytes=content.size,
        checksum=content_checksum(content),
        dropped_mass=0.0,
        seconds=float(written["seconds"][0]),
    )
    return info, content
