"""A source to rows on disk, batch by batch, with every bad record counted and listed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from orchestrator.encode import Encoder
from orchestrator.errors import Refusal
from orchestrator.files import EXCERPT_CHARACTERS, Record
from orchestrator.marks import Marks, mark_arrays, marked, marks_of
from orchestrator.pieces import Bad, Encoded, fit
from orchestrator.rows import RowWriter
from orchestrator.settings import DataConfig
from orchestrator.sources import Source
from strategies.domains import domain_id

BATCH_RECORDS = 1024
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class SplitInfo:
    """Size of one prepared split."""

    rows: int
    tokens: int
    loss_tokens: int
    longest_tokens: int
    domains: Mapping[str, int] = field(default_factory=dict)
    """Rows of each domain by name, where the data has domains."""


@dataclass
class Staged:
    """What became of one source's records."""

    source: Source
    folder: Path
    """Holds its rows as a split named `train` until they are shared out."""
    info: SplitInfo = SplitInfo(0, 0, 0, 0)
    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    domains: dict[int, str] = field(default_factory=dict)
    """Names of the domains of its rows, by number."""


def stage(source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, quarantine: Path) -> Staged:
    """Encodes a source into `folder/train` and appends its bad records to `quarantine`."""
    staged = Staged(source, folder)
    with quarantine.open("a", encoding="utf-8") as file, RowWriter(folder / "train", marked(config)) as writer:
        encoder = Encoder(tokenizer, source.where)
        for batch in _batches(source.records()):
            _encode(staged, batch, config, encoder, writer, file)
    staged.info = split_info(writer)
    return staged


def split_info(writer: RowWriter) -> SplitInfo:
    return SplitInfo(writer.rows, writer.tokens, writer.loss_tokens, writer.longest_tokens)


def _encode(staged: Staged, batch: list[Record], config: DataConfig, encoder: Encoder, writer: RowWriter, quarantine: IO[str]) -> None:
    encoded = iter(encoder.encode([record.columns for record in batch if record.problem is None]))
    kept: list[Encoded] = []
    numbers: list[int] = []
    marks: list[Marks] = []
    for number, record in enumerate(batch, start=staged.records):
        row = Bad(record.problem) if record.problem is not None else next(encoded)
        pieces = row if isinstance(row, Bad) else fit(row, config.max_length_tokens, config.overlong)
        mark = marks_of(record.columns, config)
        bad = pieces if isinstance(pieces, Bad) else mark if isinstance(mark, Bad) else None
        if bad:
            staged.bad[bad.reason] += 1
            quarantine.write(_quarantined(record, bad))
        elif isinstance(pieces, list) and isinstance(mark, Marks):
            kept += pieces
            numbers += [number] * len(pieces)
            marks += [mark] * len(pieces)
    staged.records += len(batch)
    staged.domains |= {domain_id(m.domain): m.domain for m in marks if m.domain is not None}
    _write(writer, kept, numbers, mark_arrays(marks, marked(config)))


def _write(writer: RowWriter, rows: list[Encoded], numbers: list[int], marks: Mapping[str, NDArray[np.generic]]) -> None:
    if rows:
        tokens = np.concatenate([row.tokens for row in rows])
        masks = np.concatenate([row.loss_mask for row in rows])
        lengths = np.asarray([len(row.tokens) for row in rows], dtype=np.int32)
        writer.write(tokens, masks, lengths, np.asarray(numbers, dtype=np.int64), marks)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Consecutive records, some thousand of short ones or a few of long ones."""
    batch: list[Record] = []
    held = 0
    for record in records:
        batch.append(record)
        held += sum(len(value) for value in record.columns.values() if isinstance(value, str | list))
        if len(batch) == BATCH_RECORDS or held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _quarantined(record: Record, bad: Bad) -> str:
    excerpt = record.excerpt or ", ".join(f"{name}: {str(value)[:EXCERPT_CHARACTERS]}" for name, value in record.columns.items())
    reason = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason
    return json.dumps({"source": record.source, "row": record.row, "reason": reason, "excerpt": excerpt[:EXCERPT_CHARACTERS]}) + "\n"


def check_staged(staged: Staged, config: DataConfig, quarantine: Path, kept_file: Path) -> None:
    """Refuses a source without rows or with too many bad records, and keeps the list of those as `kept_file`."""
    where, bad, rows = f"{staged.source.where} {staged.source.spec!r}", staged.bad.total(), staged.info.rows
    if staged.records == 0:
        raise Refusal(where, "no records", "at least one", "Check the path and that the files are not empty.")
    if rows and bad / staged.records <= config.max_bad_share:
        return
    os.replace(quarantine, kept_file)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in staged.bad.most_common(5))
    expected = f"a share of at most {config.max_bad_share} (data.max_bad_share)" if rows else "at least one row to learn from"
    raise Refusal(where, f"{bad} bad records of {staged.records} ({reasons})", expected, f"Each of them is listed in {kept_file}.")
