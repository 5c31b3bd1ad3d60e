"""A bundle: one worker's fraction of one step, as one Arrow row whose columns are flat primitive lists.

One row per block keeps Ray Data from regrouping anything, and flat lists are zero-copy in both directions.
Control columns, each of one number: `step` (the optimizer step it belongs to, from 1; 0 for held-out rows), `bundle`
(its number in the attempt's stream), `attempt`, `rows_total` (rows of the whole step over all workers), `steps` (of the run), and
`control/<name>`, float64, the values of controllers that are due for the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from strategies.core import Columns

HELD_OUT_STEP = 0


def to_table(columns: Columns) -> pa.Table:
    """One-row table of list columns; arrays must be one-dimensional."""
    arrays = {}
    for name, values in columns.items():
        offsets = pa.array([0, len(values)], type=pa.int64())
        arrays[name] = pa.LargeListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values)))
    return pa.table(arrays)


def from_table(table: pa.Table) -> Columns:
    """The columns of a one-row table, without copying."""
    if table.num_rows != 1:
        raise ValueError(f"a bundle is one row, and this block has {table.num_rows}")
    return {name: _flat(table.column(name)) for name in table.column_names}


def scalar(columns: Columns, name: str) -> int:
    """The number in a control column."""
    return int(columns[name][0])


def _flat(column: pa.ChunkedArray) -> NDArray[np.generic]:
    chunk = next(c for c in column.chunks if len(c))
    values: NDArray[np.generic] = chunk.flatten().to_numpy(zero_copy_only=True)
    return values
