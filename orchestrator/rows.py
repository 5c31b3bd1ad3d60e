"""Prepared rows on disk: one folder of flat .npy files per split, written as a stream and read by memory mapping.

`tokens` (S,) int32 and `loss_mask` (S,) uint8 hold all rows one after the other; `offsets` (R+1,) int64 and `lengths`
(R,) int32 say where each row lies; `source_row` (R,) int64 is the number, from 0, of the record in the source that the
row was made from. Where the data tells them, `domain` (R,) int64 is the number of each row's domain (`strategies.domains`), and
`score` (R,) float32 a number of each row. Imports only numpy and the standard library, because the process that reads rows
starts with it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from strategies.core import Columns

Split = Literal["train", "held_out"]

ARRAYS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype(np.int32),
    "loss_mask": np.dtype(np.uint8),
    "offsets": np.dtype(np.int64),
    "lengths": np.dtype(np.int32),
    "source_row": np.dtype(np.int64),
}
"""Files of a split and their dtypes."""
MARKS: dict[str, np.dtype[Any]] = {"domain": np.dtype(np.int64), "score": np.dtype(np.float32)}
"""Files of a split whose data says so much of its rows, and their dtypes."""
NO_MARKS: Mapping[str, NDArray[Any]] = {}


class Rows:
    """Random access to the rows of one prepared split. Holds only memory maps; pickles as its two arguments."""

    def __init__(self, folder: str, split: Split):
        """Opens `folder/split`; `OSError` or `ValueError` when a file of it is missing or is not what it should be."""
        self.folder, self.split = folder, split
        home = Path(folder) / split
        arrays = {name: np.load(home / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        arrays |= {name: np.load(path, mmap_mode="r") for name in MARKS if (path := home / f"{name}.npy").exists()}
        rows, size = len(arrays["lengths"]), len(arrays["tokens"])
        expected = {"tokens": size, "loss_mask": size, "offsets": rows + 1, "lengths": rows, "source_row": rows}
        for name, array in arrays.items():
            shape, dtype = (expected.get(name, rows),), (ARRAYS | MARKS)[name]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{split}/{name}.npy holds {array.shape} {array.dtype}; expected {shape} {dtype}")
        if arrays["offsets"][-1] != size:
            raise ValueError(f"{split}/offsets.npy ends at {arrays['offsets'][-1]}; expected {size}, the tokens there are")
        self.lengths: NDArray[np.int32] = arrays["lengths"]
        self.source_row: NDArray[np.int64] = arrays["source_row"]
        self.marks: Mapping[str, NDArray[Any]] = {name: arrays[name] for name in MARKS if name in arrays}
        """Those of `MARKS` that the data has, each `(R,)`."""
        self._tokens, self._mask, self._offsets = (np.asarray(arrays[name]) for name in ("tokens", "loss_mask", "offsets"))

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type[Rows], tuple[str, Split]]:
        return (Rows, (self.folder, self.split))

    def read(self, indices: NDArray[np.int64]) -> Columns:
        """The rows at `indices` (R,), in that order: `tokens` (S,) int32, `lengths` (R,) int32, `loss_mask` (S,) uint8,
        `row_id` (R,) int64, and `domain` (R,) int64 where the data has domains. `IndexError` for an index outside the split;
        negative indices are outside."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} asked of {self.split}, which has rows 0..{len(self) - 1}")
        spans = list(zip(self._offsets[wanted].tolist(), self._offsets[wanted + 1].tolist(), strict=True))
        return {
            "tokens": _gather(self._tokens, spans),
            "lengths": np.asarray(self.lengths[wanted]),
            "loss_mask": _gather(self._mask, spans),
            "row_id": wanted.copy(),
            **({"domain": np.asarray(self.marks["domain"][wanted])} if "domain" in self.marks else {}),
        }


def _gather(flat: NDArray[Any], spans: Sequence[tuple[int, int]]) -> NDArray[Any]:
    return np.concatenate([flat[start:stop] for start, stop in spans] or [flat[:0]])


class RowWriter:
    """Writes one split as a stream; memory holds only the batch in hand. Complete once its `with` block has ended."""

    def __init__(self, folder: Path, marks: Collection[str] = ()):
        """`marks` are those of `MARKS` that rows have."""
        folder.mkdir(parents=True)
        dtypes = ARRAYS | {name: MARKS[name] for name in marks}
        self._files = {name: _Npy(folder / f"{name}.npy", dtype) for name, dtype in dtypes.items()}
        self._files["offsets"].append(np.zeros(1, dtype=np.int64))
        self.rows, self.tokens, self.loss_tokens, self.longest_tokens = 0, 0, 0, 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def write(
        self,
        tokens: NDArray[Any],
        loss_mask: NDArray[Any],
        lengths: NDArray[Any],
        source_row: NDArray[Any],
        marks: Mapping[str, NDArray[Any]] = NO_MARKS,
    ) -> None:
        """Appends R rows given as flat arrays (S,), (S,) and per-row arrays (R,), (R,), of the dtypes in `ARRAYS`, with all the
        marks that rows have, each (R,)."""
        if not len(lengths):
            return
        ends = self.tokens + np.cumsum(lengths, dtype=np.int64)
        given = {"tokens": tokens, "loss_mask": loss_mask, "offsets": ends, "lengths": lengths, "source_row": source_row}
        for name, values in (given | dict(marks)).items():
            self._files[name].append(values)
        self.rows += len(lengths)
        self.tokens = int(ends[-1])
        self.loss_tokens += int(np.count_nonzero(loss_mask))
        self.longest_tokens = max(self.longest_tokens, int(lengths.max()))


def rows_digest(folder: Path) -> str:
    """sha256 of what the splits of prepared data hold: their ids, masks and where rows lie."""
    digest = hashlib.sha256()
    for split, name in itertools.product(("train", "held_out"), ("tokens", "loss_mask", "lengths")):
        with (folder / split / f"{name}.npy").open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class _Npy:
    """A one-dimensional .npy file that grows. Its header leaves room for the final length, which `close` fills in."""

    def __init__(self, path: Path, dtype: np.dtype[Any]):
        self._file: IO[bytes] = path.open("wb")
        self._dtype = dtype
        self._length = 0
        self._header()

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()

    def _header(self) -> None:
        shape = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, shape)
