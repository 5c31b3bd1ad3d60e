"""One part of a store: the encoded answers about consecutive rows, as an Arrow file that is read by memory mapping.

Columns: `row_id` int64, `row_hash` uint64 of the row's ids and mask, and one `large_list<fixed_size_list<T>[w]>` for each
array of the codec, with w numbers of each of the row's loss tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from cluster.codecs import Arrays
from cluster.engines import Columns

CONTROL = ("row_id", "row_hash")


class StoreDamaged(ValueError):
    """A store holds something else than was put in, or is of other rows. Its message says which file and row."""


def row_hashes(columns: Columns) -> NDArray[np.uint64]:
    """`(R,)` hashes of each row's token ids and loss mask."""
    lengths = columns["lengths"].astype(np.int64)
    ends = np.cumsum(lengths)
    tokens, mask = columns["tokens"].astype(np.int32, copy=False), columns["loss_mask"].astype(np.uint8, copy=False)
    spans = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    return np.asarray([_hash(mask[a:b], _hash(tokens[a:b], 0)) for a, b in spans], dtype=np.uint64)


def loss_tokens_of_rows(columns: Columns) -> NDArray[np.int64]:
    """`(R,)` loss tokens of each row."""
    lengths = columns["lengths"].astype(np.int64)
    ends = np.cumsum(lengths)
    counts = np.concatenate([[0], np.cumsum(columns["loss_mask"].astype(bool), dtype=np.int64)])
    return np.asarray(counts[ends] - counts[ends - lengths], dtype=np.int64)


def part_content(columns: Columns, arrays: Mapping[str, NDArray[Any]]) -> pa.Buffer:
    """The Arrow file of consecutive rows `columns` (with `row_id`) whose N loss tokens have `arrays`."""
    offsets = np.concatenate([[0], np.cumsum(loss_tokens_of_rows(columns))]).astype(np.int64)
    for name, values in arrays.items():
        if values.ndim != 2 or len(values) != offsets[-1]:
            raise ValueError(f"array {name!r}: got the shape {values.shape}; expected ({offsets[-1]}, w)")
    kept = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    table = pa.table(
        {
            "row_id": pa.array(columns["row_id"], type=pa.int64()),
            "row_hash": pa.array(row_hashes(columns)),
            **{name: _listed(values, offsets) for name, values in kept.items()},
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _listed(values: NDArray[Any], offsets: NDArray[np.int64]) -> pa.Array:
    inner = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.LargeListArray.from_arrays(pa.array(offsets), inner)


def content_checksum(content: pa.Buffer | bytes) -> str:
    """Hexadecimal digits that tell a file from a damaged one."""
    return xxhash.xxh3_128_hexdigest(content)


def _hash(values: NDArray[Any], seed: int) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(values).data if values.size else b"", seed=seed)


class Part:
    """Random access to the rows of one part."""

    def __init__(self, where: str, content: pa.Buffer):
        """`where` names the file in errors. `StoreDamaged` when `content` is not an Arrow file of a part."""
        self._where = where
        try:
            table = pa.ipc.open_file(pa.BufferReader(content)).read_all().combine_chunks()
            self._control = {name: table.column(name).chunk(0).to_numpy() for name in CONTROL}
            lists = {name: table.column(name).chunk(0) for name in table.column_names if name not in CONTROL}
            self._offsets = next(iter(lists.values())).offsets.to_numpy()
            self._arrays = {name: _unlisted(values) for name, values in lists.items()}
        except (pa.ArrowException, KeyError, IndexError, StopIteration, OSError, ValueError) as error:
            raise StoreDamaged(f"{where}: cannot be read ({' '.join(str(error).split())[:200]})") from error

    def __len__(self) -> int:
        return len(self._control["row_id"])

    def row(self, index: int, row_id: int, row_hash: int | None = None) -> Arrays:
        """Arrays of the row at `index`, without a copy. `StoreDamaged` unless it is `row_id` and, when given, its ids and mask
        have `row_hash`."""
        where = f"{self._where}: row {row_id}"
        if index >= len(self) or int(self._control["row_id"][index]) != row_id:
            raise StoreDamaged(f"{where} is not where it should be")
        if row_hash is not None and int(self._control["row_hash"][index]) != row_hash:
            raise StoreDamaged(f"{where} was scored with other token ids or another loss mask")
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        return {name: values[start:stop] for name, values in self._arrays.items()}

    def nothing(self) -> Arrays:
        """Arrays of no token."""
        return {name: values[:0] for name, values in self._arrays.items()}


def _unlisted(values: pa.LargeListArray) -> NDArray[Any]:
    inner = values.values
    return np.asarray(inner.values.to_numpy(zero_copy_only=True)).reshape(len(inner), inner.type.list_size)
