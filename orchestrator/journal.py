"""What a run's folder remembers of its own reporting, whether or not MLflow answers.

    metrics.jsonl    every metric row of the surviving lineage, one JSON object a line; the truth that MLflow is a copy of
    outbox.jsonl     params, tags, texts, files and students that MLflow is to get, in order
    mlflow.json      which MLflow run this folder is, its status, and whether MLflow has everything
    heartbeat.json   which process drives the run, and when it was last seen

Knows nothing of MLflow. Files are readable at any time: lines are appended whole, small files are replaced whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

import psutil

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
T = TypeVar("T")
METRICS = "metrics.jsonl"
OUTBOX = "outbox.jsonl"
RECORD = "mlflow.json"
HEARTBEAT = "heartbeat.json"

_READ_LINES = 500
_FOREIGN_SILENCE_SECONDS = 300.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricRow:
    """Metrics of one step."""

    step: int
    attempt: int
    values: Mapping[str, float]
    time: float
    """Unix seconds."""


class Cursor(NamedTuple):
    """A place in `Lines`: byte `offset` of the file's `generation` (each rewrite makes a new one)."""

    generation: int = 0
    offset: int = 0


START = Cursor()


class Lines:
    """A file of JSON objects, one a line, that one process appends to and any thread reads.

    A torn last line (its writer was killed) is never read, and is cut off before the next append.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._generation = 0
        self._file: IO[bytes] | None = None

    def append(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Handed to the operating system before this returns, so that it survives the process."""
        data = b"".join(json.dumps(o, allow_nan=False).encode() + b"\n" for o in objects)
        with self._lock:
            if self._file is None:
                self._file = _open_mended(self.path)
            self._file.write(data)
            self._file.flush()

    def read(self, cursor: Cursor = START, limit: int = _READ_LINES) -> tuple[list[Any], Cursor]:
        """Up to `limit` objects from `cursor` on, and the cursor behind them. A cursor of before a rewrite starts over."""
        with self._lock:
            offset = cursor.offset if cursor.generation == self._generation else 0
            found: list[Any] = []
            if not self.path.exists():
                return found, Cursor(self._generation, offset)
            with self.path.open("rb") as file:
                file.seek(offset)
                while len(found) < limit and (line := file.readline()).endswith(b"\n"):
                    offset += len(line)
                    found += _parsed(line, self.path)
            return found, Cursor(self._generation, offset)

    def all(self) -> Iterator[Any]:
        """Every object, read in small pieces."""
        found, cursor = self.read()
        while found:
            yield from found
            found, cursor = self.read(cursor)

    def rewrite(self, keep: Callable[[Any], bool]) -> None:
        """Drops every object that `keep` refuses; the file is replaced whole, or not at all."""
        with self._lock:
            if not self.path.exists():
                return
            temporary = self.path.with_suffix(".part")
            with self.path.open("rb") as old, temporary.open("wb") as new:
                new.writelines(line for line in old if any(keep(o) for o in _parsed(line, self.path)))
            if self._file is not None:
                self._file.close()
                self._file = None
            temporary.replace(self.path)
            self._generation += 1

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


class Journal:
    """`metrics.jsonl` of one run. Values that JSON cannot hold are written as the texts "nan", "inf" and "-inf"."""

    def __init__(self, folder: Path):
        self._lines = Lines(folder / METRICS)

    @property
    def path(self) -> Path:
        return self._lines.path

    def append(self, rows: Sequence[MetricRow]) -> None:
        self._lines.append(_line(row) for row in rows)

    def truncate(self, step: int, attempt: int) -> None:
        """Attempt `attempt` starts after `step`: what older attempts wrote beyond it is no longer part of the run."""
        self._lines.rewrite(lambda line: line["step"] <= step or line["attempt"] >= attempt)

    def read(self, cursor: Cursor = START) -> tuple[list[MetricRow], Cursor]:
        """Some rows from `cursor` on and the cursor behind them; no rows means that there are no more."""
        lines, after = self._lines.read(cursor)
        return [_row(line) for line in lines], after

    def rows(self) -> Iterator[MetricRow]:
        return map(_row, self._lines.all())

    def close(self) -> None:
        self._lines.close()


@dataclass(frozen=True)
class RunRecord:
    """Which MLflow run a folder is, and how far MLflow knows about it."""

    uri: str
    experiment_id: str
    run_id: str
    status: Status = "RUNNING"
    delivered: bool = False
    """MLflow has the status and everything else."""

    def save(self, folder: Path) -> None:
        """Readable by the owner alone, because a tracking URI may carry a password."""
        _replace(folder / RECORD, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> RunRecord | None:
        """None when the folder is not a tracked run."""
        return _load(folder / RECORD, cls)


@dataclass(frozen=True)
class Heartbeat:
    """The process that drives a run. A pid is re-used; with its start time it is one process for ever."""

    host: str
    pid: int
    started: float
    """Unix seconds at which the process started."""
    beat: float
    """Unix seconds at which it was last seen."""

    @classmethod
    def now(cls) -> Heartbeat:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), time.time())

    def save(self, folder: Path) -> None:
        _replace(folder / HEARTBEAT, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Heartbeat | None:
        return _load(folder / HEARTBEAT, cls)

    def alive(self, silence_seconds: float = _FOREIGN_SILENCE_SECONDS) -> bool:
        """Whether the process still runs; of another machine only the age of its last beat is known."""
        if self.host != socket.gethostname():
            return time.time() - self.beat < silence_seconds
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _row(line: Mapping[str, Any]) -> MetricRow:
    return MetricRow(line["step"], line["attempt"], {k: float(v) for k, v in line["values"].items()}, line["time"])


def _line(row: MetricRow) -> dict[str, Any]:
    return {"step": row.step, "attempt": row.attempt, "time": row.time, "values": {k: _plain(v) for k, v in row.values.items()}}


def _plain(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))


def _parsed(line: bytes, path: Path) -> list[Any]:
    """The line's object; none, with a warning, when a crash of the machine left rubbish."""
    try:
        return [json.loads(line)]
    except ValueError:
        logger.warning("%s: skipped a line that is not JSON (%d bytes)", path, len(line))
        return []


def _open_mended(path: Path) -> IO[bytes]:
    file = path.open("ab")
    with path.open("rb+") as old:
        end = old.seek(0, os.SEEK_END)
        whole = end
        while whole and _byte(old, whole - 1) != b"\n":
            whole -= 1
        if whole < end:
            old.truncate(whole)
    return file


def _byte(file: IO[bytes], offset: int) -> bytes:
    file.seek(offset)
    return file.read(1)


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(content, file)
    temporary.replace(path)


def _load(path: Path, kind: type[T]) -> T | None:
    """None where there is no file, and, with a warning, where it cannot be read: whoever walks all runs must get past it."""
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s), and counts as missing.", path, error)
        return None
