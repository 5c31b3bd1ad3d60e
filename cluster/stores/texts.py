"""One part of a text store: what was written for consecutive prompts, as an Arrow file with one row for each text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.engines import Columns
from cluster.stores.parts import StoreDamaged

COLUMNS = ("row_id", "sample", "finished", "tokens", "logprobs")


@dataclass(frozen=True)
class WrittenText:
    """One text."""

    row_id: int
    """Number of its prompt."""
    sample: int
    finished: bool
    tokens: NDArray[np.int32]
    """`(T,)`, the one that ended it included."""
    logprobs: NDArray[np.float32]
    """`(T,)` at temperature 1; NaN where the engine was not told."""


def texts_content(written: Columns) -> pa.Buffer:
    """The Arrow file of what `cluster.engines.Writer.write` answered."""
    offsets = np.concatenate([[0], np.cumsum(written["lengths"].astype(np.int64))])
    lists = {n: pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(written[n])) for n in ("tokens", "logprobs")}
    table = pa.table({**{n: pa.array(written[n]) for n in COLUMNS if n not in lists}, **lists})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read_texts(where: str, content: pa.Buffer) -> Iterator[WrittenText]:
    """The texts of a part in order. `StoreDamaged`, naming `where`, when `content` is no such file."""
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all().combine_chunks()
        columns: list[list[Any]] = [_values(table.column(n)) for n in COLUMNS]
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise StoreDamaged(f"{where}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    for row_id, sample, finished, tokens, logprobs in zip(*columns, strict=True):
        yield WrittenText(int(row_id), int(sample), bool(finished), tokens, logprobs)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Numbers, or an array for each list."""
    if not pa.types.is_large_list(column.type):
        return list(column.to_numpy())
    return [value.values.to_numpy(zero_copy_only=True) for value in (column[i] for i in range(len(column)))]
