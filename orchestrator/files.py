"""Readers of JSONL, Parquet and text files: one stream of records, in which what cannot be read is a record with a problem.

So one broken line costs one line. A text file is one document and must fit in memory, and so must a `.json` file that
is one array; everything else is read piece by piece.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import Refusal

FileKind = Literal["JSONL", "Parquet", "text"]
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".cu", ".go", ".rs", ".java", ".js", ".ts", ".sh", ".sql")
ROW_COLUMNS = ("tokens", "loss_mask", "messages", "prompt", "completion", "text", "answer")
"""Columns that a row may be made from, or judged by."""
BATCH_ROWS = 1000
EXCERPT_CHARACTERS = 200


@dataclass(frozen=True)
class Record:
    """One record of a source, its columns already renamed."""

    source: str
    """File, or dataset and split, it was read from."""
    row: int
    """Its number in there, from 1; the line of a JSONL file."""
    columns: Mapping[str, object]
    problem: str | None = None
    """Why it could not be read; `columns` is empty then."""
    excerpt: str = ""
    """Beginning of what could not be read."""


def kind_of(path: Path) -> FileKind | None:
    """Kind of a file by its suffix; None for a suffix not known here."""
    name = path.name.lower()
    if name.endswith(JSON_SUFFIXES):
        return "JSONL"
    if name.endswith(PARQUET_SUFFIXES):
        return "Parquet"
    return "text" if name.endswith(TEXT_SUFFIXES) else None


def known_suffixes() -> str:
    return ", ".join((*JSON_SUFFIXES[:3], PARQUET_SUFFIXES[0], *TEXT_SUFFIXES))


def read_file(path: Path, kind: FileKind, where: str, renames: Mapping[str, str], marks: Collection[str] = ()) -> Iterator[Record]:
    """Records of one file in order, with the columns that rows are made from and `marks`. `Refusal` (at `where`) when the file as a
    whole cannot be read."""
    try:
        yield from _parquet(path, renames, marks) if kind == "Parquet" else _READERS[kind](path, renames)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise _unreadable(path, kind, where, error) from error


def parquet_columns(path: Path, where: str) -> frozenset[str]:
    """Names of the columns of a Parquet file; `Refusal` when it is not one."""
    try:
        return frozenset(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "Parquet", where, error) from error


def renamed(columns: Mapping[str, object], renames: Mapping[str, str]) -> dict[str, object]:
    """The columns under their new names; a renamed column wins over one that had the name."""
    if not renames:
        return dict(columns)
    kept = {name: value for name, value in columns.items() if name not in renames}
    return {**kept, **{new: columns[old] for old, new in renames.items() if old in columns}}


def wanted(names: list[str], renames: Mapping[str, str], marks: Collection[str] = ()) -> list[str]:
    """Those of a table's columns that rows are made from, and `marks`."""
    return [name for name in names if name in ROW_COLUMNS or name in renames or name in marks]


def _text(path: Path, renames: Mapping[str, str]) -> Iterator[Record]:
    content = path.read_bytes()
    try:
        yield Record(str(path), 1, renamed({"text": content.decode("utf-8-sig")}, renames))
    except UnicodeDecodeError:
        yield _broken(path, 1, "not UTF-8", content)


def _json(path: Path, renames: Mapping[str, str]) -> Iterator[Record]:
    """One record per non-empty line; a `.json` file that begins with `[` has one record per element."""
    opened: Callable[..., IO[bytes]] = gzip.open if path.suffix == ".gz" else open  # type: ignore[assignment]
    with opened(path, "rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start.startswith(b"[") and path.name.removesuffix(".gz").endswith(".json"):
            yield from _array(path, file.read(), renames)
            return
        for row, line in enumerate(file, start=1):
            if content := line.removeprefix(b"\xef\xbb\xbf").strip():
                yield _line(path, row, content, renames)


def _array(path: Path, content: bytes, renames: Mapping[str, str]) -> Iterator[Record]:
    try:
        elements = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield _broken(path, 1, "not valid JSON", content)
        return
    for row, element in enumerate(elements, start=1):
        if isinstance(element, dict):
            yield Record(str(path), row, renamed(element, renames))
        else:
            yield _broken(path, row, "not a JSON object", json.dumps(element).encode())


def _line(path: Path, row: int, line: bytes, renames: Mapping[str, str]) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _broken(path, row, "not UTF-8", line)
    except (ValueError, RecursionError):
        return _broken(path, row, "not valid JSON", line)
    if not isinstance(value, dict):
        return _broken(path, row, "not a JSON object", line)
    return Record(str(path), row, renamed(value, renames))


def _parquet(path: Path, renames: Mapping[str, str], marks: Collection[str]) -> Iterator[Record]:
    """Reads no other columns."""
    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(BATCH_ROWS, columns=wanted(file.schema_arrow.names, renames, marks))
        for first, batch in enumerate(batches):
            for row, values in enumerate(batch.to_pylist(), start=first * BATCH_ROWS + 1):
                yield Record(str(path), row, renamed(values, renames))


_READERS: Mapping[FileKind, Callable[[Path, Mapping[str, str]], Iterator[Record]]] = {"JSONL": _json, "text": _text}


def _unreadable(path: Path, kind: FileKind, where: str, error: Exception) -> Refusal:
    problem = " ".join(str(error).split())
    return Refusal(where, f"{str(path)!r}, which cannot be read ({problem})", f"a readable {kind} file", "Mend or remove the file.")


def _broken(path: Path, row: int, problem: str, content: bytes) -> Record:
    return Record(str(path), row, {}, problem, content[:EXCERPT_CHARACTERS].decode("utf-8", errors="replace"))
