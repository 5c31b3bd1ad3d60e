"""Data in: any source to two prepared splits of token ids, once per fingerprint.

`prepare` streams the train source through the encoder into flat files, sets held-out rows aside and moves the finished
folder into the cache in one step. Memory holds one batch of records, and 24 bytes per prepared row while the held-out rows
are chosen; a single text document must fit in memory.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from orchestrator.config import DataConfig
from orchestrator.encode import Encoder
from orchestrator.errors import Refusal
from orchestrator.files import EXCERPT_CHARACTERS, Record
from orchestrator.fingerprint import data_fingerprint, template_digest, tokenizer_digest
from orchestrator.held_out import choose_held_out
from orchestrator.pieces import Bad, Encoded, fit
from orchestrator.rows import Rows, RowWriter
from orchestrator.sources import Source, open_source

__all__ = ["FirstRow", "PreparedData", "SplitInfo", "prepare", "template_digest", "tokenizer_digest"]

BATCH_RECORDS = 1024
BATCH_CHARACTERS = 1 << 22
COPY_ROWS = 4096
FIRST_ROW_TOKENS = 128

HeldOutBy = Literal["source", "documents", "chunks"]


@dataclass(frozen=True)
class SplitInfo:
    """Size of one prepared split."""

    rows: int
    tokens: int
    loss_tokens: int
    longest_tokens: int


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
    quarantine_file: str
    """JSONL of the bad records: source, row (from 1), reason, excerpt."""
    first_row: FirstRow


@dataclass
class _Tally:
    """What became of one source's records."""

    source: Source
    staged: Path
    """Holds its rows as a split named `train` until they are shared out."""
    info: SplitInfo = SplitInfo(0, 0, 0, 0)
    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, cache: Path) -> PreparedData:
    """Prepared splits for these settings, made in `cache` unless they are there already.

    There are at most `held_out_rows` held-out rows. From a source of their own that many are chosen by `seed`. Otherwise
    they are whole documents of `train`, chosen by `seed` before documents are split and cut to that number, so that no
    document stands on both sides. When that would waste more rows than it holds out and over a tenth of all (one big
    document, say), documents are split first and chunks are chosen.
    Processes that prepare the same at once both succeed and share one result; a killed one leaves nothing half-made.
    Raises `Refusal` for data that cannot be learnt from.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    train = open_source(config.train, config, config.split, "data.train")
    held_out = None if config.held_out is None else open_source(config.held_out, config, config.held_out_split, "data.held_out")
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
    same_split = train.spec != held_out.spec or config.split == config.held_out_split
    if both and same_split:
        got = f"{min(both).name!r}, which data.train reads too"
        raise Refusal("data.held_out", got, "data that is not trained on", "Leave data.held_out out to set rows aside from data.train.")


def _make(
    work: Path, opened: list[Source], config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, fingerprint: str
) -> PreparedData:
    """Fills `work` with both splits and the quarantine file."""
    quarantine = work / "quarantine.jsonl"
    tallies = []
    for number, source in enumerate(opened):
        tally = _Tally(source, work / f"staged_{number}")
        with quarantine.open("a", encoding="utf-8") as file, RowWriter(tally.staged / "train") as writer:
            _encode(tally, config, Encoder(tokenizer, source.where), writer, file, config.max_rows if number == 0 else None)
        tally.info = _info(writer)
        _check_tally(tally, config, quarantine, work.parent / f"quarantine-{fingerprint[:16]}.jsonl")
        tallies.append(tally)
    train, held_out, how, dropped = _split(work, tallies, config.held_out_rows, seed)
    for tally in tallies:
        shutil.rmtree(tally.staged)
    bad = sum((tally.bad for tally in tallies), Counter[str]())
    return PreparedData(
        folder=str(work),
        fingerprint=fingerprint,
        train=train,
        held_out=held_out,
        held_out_by=how,
        dropped_rows=dropped,
        records=sum(tally.records for tally in tallies),
        quarantined=dict(bad.most_common()),
        quarantine_file=str(quarantine),
        first_row=_first_row(work, tokenizer),
    )


def _encode(
    tally: _Tally, config: DataConfig, encoder: Encoder, writer: RowWriter, quarantine: IO[str], max_rows: int | None
) -> None:
    """Writes a source's rows, and its bad records to the quarantine file."""
    for batch in _batches(itertools.islice(tally.source.records(), max_rows)):
        encoded = iter(encoder.encode([record.columns for record in batch if record.problem is None]))
        kept: list[Encoded] = []
        numbers: list[int] = []
        for number, record in enumerate(batch, start=tally.records):
            row = Bad(record.problem) if record.problem is not None else next(encoded)
            pieces = row if isinstance(row, Bad) else fit(row, config.max_length_tokens, config.overlong)
            if isinstance(pieces, Bad):
                tally.bad[pieces.reason] += 1
                quarantine.write(_quarantined(record, pieces))
            else:
                kept += pieces
                numbers += [number] * len(pieces)
        tally.records += len(batch)
        _write(writer, kept, numbers)


def _write(writer: RowWriter, rows: list[Encoded], numbers: list[int]) -> None:
    if rows:
        tokens = np.concatenate([row.tokens for row in rows])
        masks = np.concatenate([row.loss_mask for row in rows])
        lengths = np.asarray([len(row.tokens) for row in rows], dtype=np.int32)
        writer.write(tokens, masks, lengths, np.asarray(numbers, dtype=np.int64))


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


def _check_tally(tally: _Tally, config: DataConfig, quarantine: Path, kept_file: Path) -> None:
    """Refuses a source without rows or with too many bad records, and keeps the list of those as `kept_file`."""
    where, bad, rows = f"{tally.source.where} {tally.source.spec!r}", tally.bad.total(), tally.info.rows
    if tally.records == 0:
        raise Refusal(where, "no records", "at least one", "Check the path and that the files are not empty.")
    if rows and bad / tally.records <= config.max_bad_share:
        return
    os.replace(quarantine, kept_file)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in tally.bad.most_common(5))
    expected = f"a share of at most {config.max_bad_share} (data.max_bad_share)" if rows else "at least one row to learn from"
    raise Refusal(where, f"{bad} bad records of {tally.records} ({reasons})", expected, f"Each of them is listed in {kept_file}.")


def _split(work: Path, tallies: list[_Tally], held_out_rows: int, seed: int) -> tuple[SplitInfo, SplitInfo, HeldOutBy, int]:
    """Makes `train` and `held_out` of the staged rows; also says how held-out rows were chosen and how many were dropped."""
    rows = Rows(str(tallies[-1].staged), "train")
    if len(tallies) == 2:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:held_out_rows])
        (tallies[0].staged / "train").rename(work / "train")
        return tallies[0].info, _copy(rows, chosen, work / "held_out"), "source", len(rows) - len(chosen)
    if len(rows) <= held_out_rows:
        got = f"{len(rows)} rows to train on and to hold out from"
        raise Refusal("data.held_out_rows", got, f"more than data.held_out_rows = {held_out_rows}", "Set it lower, or give more data.")
    kept, chosen, how = choose_held_out(np.asarray(rows.source_row), held_out_rows, seed)
    dropped = len(rows) - len(kept) - len(chosen)
    return _copy(rows, kept, work / "train"), _copy(rows, chosen, work / "held_out"), how, dropped


def _copy(rows: Rows, indices: NDArray[np.int64], folder: Path) -> SplitInfo:
    with RowWriter(folder) as writer:
        for start in range(0, len(indices), COPY_ROWS):
            wanted = indices[start : start + COPY_ROWS]
            columns = rows.read(wanted)
            writer.write(columns["tokens"], columns["loss_mask"], columns["lengths"], rows.source_row[wanted])
    return _info(writer)


def _info(writer: RowWriter) -> SplitInfo:
    return SplitInfo(writer.rows, writer.tokens, writer.loss_tokens, writer.longest_tokens)


def _first_row(work: Path, tokenizer: PreTrainedTokenizerBase) -> FirstRow:
    columns = Rows(str(work), "train").read(np.asarray([0]))
    tokens = columns["tokens"][:FIRST_ROW_TOKENS].tolist()
    return FirstRow(str(tokenizer.decode(tokens)), tuple(tokens), tuple(columns["loss_mask"][:FIRST_ROW_TOKENS].tolist()))


_MANIFEST = TypeAdapter(PreparedData)


def _load(folder: Path, fingerprint: str) -> PreparedData | None:
    """The prepared data in a folder; None when it is not there, of something else, or damaged."""
    try:
        made = _MANIFEST.validate_json((folder / "manifest.json").read_bytes())
        sizes = [len(Rows(str(folder), "train")), len(Rows(str(folder), "held_out"))]
    except (OSError, ValueError):
        return None
    if made.fingerprint != fingerprint or sizes != [made.train.rows, made.held_out.rows]:
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
