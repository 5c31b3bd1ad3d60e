"""Bundles: columns go into one Arrow row and come back equal, whatever Arrow did to the block between."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays

from orchestrator.bundle import from_table, scalar, to_table
from strategies.core import Columns

DTYPES = ["uint8", "uint16", "int32", "int64", "float32", "float64"]


def example() -> Columns:
    return {
        "tokens": np.arange(7, dtype=np.int32),
        "lengths": np.asarray([3, 4], dtype=np.int32),
        "teacher/logprobs": np.linspace(-1, 0, 14, dtype=np.float32),
        "step": np.asarray([5], dtype=np.int64),
    }


def same(got: Columns, want: Columns) -> None:
    assert list(got) == list(want)
    for name, values in want.items():
        assert got[name].dtype == values.dtype, name
        np.testing.assert_array_equal(got[name], values)


def test_columns_come_back_as_they_went_in() -> None:
    same(from_table(to_table(example())), example())


flat_arrays = some.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, some.integers(0, 20)))


@given(some.dictionaries(some.text(min_size=1), flat_arrays, max_size=4))
def test_any_flat_columns_come_back_bit_by_bit(columns: Columns) -> None:
    got = from_table(to_table(columns)) if columns else {}
    assert {n: (v.dtype, v.tobytes()) for n, v in got.items()} == {n: (v.dtype, v.tobytes()) for n, v in columns.items()}


def test_a_bundle_is_one_row_however_long_its_columns() -> None:
    assert to_table(example()).num_rows == 1


def test_an_empty_bundle_keeps_its_columns_and_types() -> None:
    empty = {"tokens": np.empty(0, dtype=np.int32), "teacher/logprobs": np.empty(0, dtype=np.float32)}
    same(from_table(to_table(empty)), empty)


def test_reading_copies_nothing() -> None:
    table = to_table(example())
    inside = table.column("tokens").chunk(0).flatten().to_numpy(zero_copy_only=True)
    assert np.shares_memory(from_table(table)["tokens"], inside)


def test_writing_copies_nothing() -> None:
    columns = example()
    assert np.shares_memory(from_table(to_table(columns))["tokens"], columns["tokens"])


def test_every_second_entry_of_an_array_is_stored_as_such() -> None:
    same(from_table(to_table({"tokens": np.arange(10, dtype=np.int32)[::2]})), {"tokens": np.arange(0, 10, 2, dtype=np.int32)})


def test_a_row_cut_out_of_a_larger_block_is_that_row() -> None:
    first, second = {"tokens": np.arange(3, dtype=np.int32)}, {"tokens": np.arange(10, 15, dtype=np.int32)}
    block = pa.concat_tables([to_table(first), to_table(second)])
    same(from_table(block.slice(1, 1)), second)
    same(from_table(block.combine_chunks().slice(1, 1)), second)


def test_empty_chunks_beside_the_row_do_not_matter() -> None:
    table = to_table(example())
    same(from_table(pa.concat_tables([table.slice(0, 0), table, table.slice(0, 0)])), example())


def test_a_bundle_survives_being_sent() -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, to_table(example()).schema) as writer:
        writer.write_table(to_table(example()))
    same(from_table(pa.ipc.open_stream(sink.getvalue()).read_all()), example())


@pytest.mark.parametrize("rows", [0, 2])
def test_a_block_of_other_than_one_row_is_refused(rows: int) -> None:
    table = to_table(example())
    with pytest.raises(ValueError, match=f"this block has {rows}"):
        from_table(pa.concat_tables([table, table]).slice(0, rows))


def test_only_flat_arrays_can_be_stored() -> None:
    with pytest.raises(pa.ArrowInvalid):
        to_table({"hidden": np.zeros((2, 3), dtype=np.float32)})


def test_a_control_column_is_one_number() -> None:
    assert scalar(from_table(to_table(example())), "step") == 5
