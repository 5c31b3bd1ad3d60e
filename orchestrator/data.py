"""Data in: any source to two prepared splits of token ids, once per fingerprint.

`prepare` streams the train source through the encoder into flat files, sets held-out rows aside and moves the finished
folder into the cache in one step. Memory holds one batch of records, and 24 bytes per prepared row while the held-out rows
are chosen; a single text document must fit in memory.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from orchestrator.errors import Refusal
from orchestrator.fingerprint import data_fingerprint, template_digest, tokenizer_digest
from orchestrator.held_out import choose_held_out
from orchestrator.marks import domain_counts, marked
from orchestrator.rows import Rows, RowWriter, rows_digest
from orchestrator.settings import DataConfig
from orchestrator.sources import Source, open_sources
from orchestrator.staging import SplitInfo, Staged, check_staged, split_info, stage

__all__ = ["FirstRow", "PreparedData", "SplitInfo", "prepare", "template_digest", "tokenizer_digest"]

COPY_ROWS = 4096
FIRST_ROW_TOKENS = 128

HeldOutBy = Literal["source", "documents", "chunks"]


@dataclass(frozen=True)
class FirstRow:
    """Beginning of the first train row, for a person to look at: special tokens included, at most `FIRST_ROW_TOKENS`."""

    text: str
    tokens: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True)
class PreparedData:
    """Two prepared splits and how they came about. `folder` is what `Rows` opens."""

    folder: str
    fingerprint: str
    """sha256 of all that the content depends on; the same fingerprint is never prepared twice."""
    train: SplitInfo
    held_out: SplitInfo
    held_out_by: HeldOutBy
    """Held-out rows come from their own source, are whole documents of `train` (no document stands on both sides), or
    are chunks of documents that are too few to give one away."""
    dropped_rows: int
    """Rows in neither split: the rest of a held-out document, or of a held-out source."""
    records: int
    """Records read from all sources."""
    quarantined: Mapping[str, int]
    """Bad records by reason."""
    content: str
    """sha256 of the rows of both splits: ids, masks and order, whatever they were made from."""
    quarantine_file: str
    """JSONL of the bad records: source, row (from 1), reason, excerpt."""
    first_row: FirstRow
    marks: tuple[str, ...] = ()
    """What it says of rows: of `orchestrator.rows.MARKS`."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of all domains."""
        return tuple(sorted({*self.train.domains, *self.held_out.domains}))


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, cache: Path) -> PreparedData:
    """Prepared splits for these settings, made in `cache` unless they are there already.

    There are at most `held_out_rows` held-out rows. From a source of their own that many are chosen by `seed`. Otherwise
    they are whole documents of `train`, chosen by `seed` before documents are split and cut to that number, so that no
    document stands on both sides. When that would waste more rows than it holds out and over a tenth of all (one big
    document, say), documents are split first and chunks are chosen.
    Processes that prepare the same at once both succeed and share one result; a killed one leaves nothing half-made.
    Raises `Refusal` for data that cannot be learnt from.
    """
    cache = cache.absolute()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    train = open_sources(config.train, config, config.split, "data.train", most_rows=config.max_rows)
    held_out = None if config.held_out is None else open_sources(config.held_out, config, config.held_out_split, "data.held_out")
    _check_held_out(train, held_out, config)
    opened = [source for source in (train, held_out) if source is not None]
    fingerprint = data_fingerprint([source.files for source in opened], config, seed, tokenizer)
    folder = cache / f"data-{fingerprint[:16]}"
    if ready := _load(folder, fingerprint):
        return ready
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    work = cache / f"{_work_prefix()}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    work.mkdir()
    try:
        made = _make(work, opened, config, tokenizer, seed, fingerprint)
        (work / "manifest.json").write_bytes(_MANIFEST.dump_json(made, indent=2))
        return _publish(work, folder, fingerprint)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_held_out(train: Source, held_out: Source | None, config: DataConfig) -> None:
    if config.held_out_rows == 0:
        raise Refusal("data.held_out_rows", "0", "at least one row to evaluate on", "Set data.held_out_rows to 64, say.")
    if held_out is None:
        return
    both = {path.resolve() for _, path in train.files} & {path.resolve() for _, path in held_out.files}
    same_split = train.spec != held_out.spec or not train.has_splits or config.split == config.held_out_split
    if both and same_split:
        got = f"{min(both).name!r}, which data.train reads too"
        raise Refusal("data.held_out", got, "data that is not trained on", "Leave data.held_out out to set rows aside from data.train.")


def _make(
    work: Path, opened: list[Source], config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, fingerprint: str
) -> PreparedData:
    """Fills `work` with both splits and the quarantine file."""
    quarantine = work / "quarantine.jsonl"
    staged = []
    for number, source in enumerate(opened):
        staged.append(stage(source, config, tokenizer, work / f"staged_{number}", quarantine))
        check_staged(staged[-1], config, quarantine, work.parent / f"quarantine-{fingerprint[:16]}.jsonl")
    train, held_out, how, dropped = _split(work, staged, config.held_out_rows, seed)
    names = {number: name for each in staged for number, name in each.domains.items()}
    for each in staged:
        shutil.rmtree(each.folder)
    bad = sum((each.bad for each in staged), Counter[str]())
    return PreparedData(
        folder=str(work),
        fingerprint=fingerprint,
        train=replace(train, domains=domain_counts(Rows(str(work), "train"), names)),
        held_out=replace(held_out, domains=domain_counts(Rows(str(work), "held_out"), names)),
        held_out_by=how,
        dropped_rows=dropped,
        records=sum(each.records for each in staged),
        quarantined=dict(bad.most_common()),
        content=rows_digest(work),
        quarantine_file=str(quarantine),
        first_row=_first_row(work, tokenizer),
        marks=marked(config),
    )


def _split(work: Path, staged: list[Staged], held_out_rows: int, seed: int) -> tuple[SplitInfo, SplitInfo, HeldOutBy, int]:
    """Makes `train` and `held_out` of the staged rows; also says how held-out rows were chosen and how many were dropped."""
    rows = Rows(str(staged[-1].folder), "train")
    if len(staged) == 2:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:held_out_rows])
        (staged[0].folder / "train").rename(work / "train")
        return staged[0].info, _copy(rows, chosen, work / "held_out"), "source", len(rows) - len(chosen)
    if len(rows) <= held_out_rows:
        got = f"{len(rows)} rows to train on and to hold out from"
        raise Refusal("data.held_out_rows", got, f"more than data.held_out_rows = {held_out_rows}", "Set it lower, or give more data.")
    kept, chosen, how = choose_held_out(np.asarray(rows.source_row), held_out_rows, seed)
    dropped = len(rows) - len(kept) - len(chosen)
    return _copy(rows, kept, work / "train"), _copy(rows, chosen, work / "held_out"), how, dropped


def _copy(rows: Rows, indices: NDArray[np.int64], folder: Path) -> SplitInfo:
    with RowWriter(folder, tuple(rows.marks)) as writer:
        for start in range(0, len(indices), COPY_ROWS):
            wanted = indices[start : start + COPY_ROWS]
            columns = rows.read(wanted)
            marks = {name: values[wanted] for name, values in rows.marks.items()}
            writer.write(columns["tokens"], columns["loss_mask"], columns["lengths"], rows.source_row[wanted], marks)
    return split_info(writer)


def _first_row(work: Path, tokenizer: PreTrainedTokenizerBase) -> FirstRow:
    columns = Rows(str(work), "train").read(np.asarray([0]))
    tokens = columns["tokens"][:FIRST_ROW_TOKENS].tolist()
    return FirstRow(str(tokenizer.decode(tokens)), tuple(tokens), tuple(columns["loss_mask"][:FIRST_ROW_TOKENS].tolist()))


_MANIFEST = TypeAdapter(PreparedData)


def _load(folder: Path, fingerprint: str) -> PreparedData | None:
    """The prepared data in a folder; None when it is not there, of something else, or damaged."""
    try:
        made = _MANIFEST.validate_json((folder / "manifest.json").read_bytes())
        splits = [Rows(str(folder), "train"), Rows(str(folder), "held_out")]
    except (OSError, ValueError, EOFError):
        return None
    if made.fingerprint != fingerprint or [len(rows) for rows in splits] != [made.train.rows, made.held_out.rows]:
        return None
    if any(tuple(rows.marks) != made.marks for rows in splits):
        return None
    return replace(made, folder=str(folder), quarantine_file=str(folder / "quarantine.jsonl"))


def _publish(work: Path, folder: Path, fingerprint: str) -> PreparedData:
    """Moves the finished work into place; where another process was first, its result is the one."""
    for _ in range(3):
        try:
            work.rename(folder)
        except OSError:
            if ready := _load(folder, fingerprint):
                return ready
            shutil.rmtree(folder, ignore_errors=True)
            continue
        break
    ready = _load(folder, fingerprint)
    if ready is None:
        raise Refusal("data", f"{str(folder)!r}, which cannot be replaced", "a cache folder to write to", "Remove the folder.")
    return ready


def _work_prefix() -> str:
    return f".preparing-{socket.gethostname()}-"


def _sweep(cache: Path) -> None:
    """Removes what processes of this machine left when they were killed."""
    for left in cache.glob(f"{_work_prefix()}*"):
        pid = left.name.removeprefix(_work_prefix()).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
