"""Prepared rows on disk: what is written is read back, by index, and by a process that knows only numpy."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.rows import ARRAYS, Rows, RowWriter

LENGTHS = (3, 1, 4, 2)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Four rows whose tokens count upwards, written in two batches."""
    with RowWriter(tmp_path / "train") as writer:
        for first, lengths in ((0, LENGTHS[:2]), (4, LENGTHS[2:])):
            tokens = np.arange(first, first + sum(lengths), dtype=np.int32)
            row = np.asarray([first, first], dtype=np.int64)
            writer.write(tokens, (tokens % 2).astype(np.uint8), np.asarray(lengths, dtype=np.int32), row)
    assert (writer.rows, writer.tokens, writer.loss_tokens, writer.longest_tokens) == (4, 10, 5, 4)
    return str(tmp_path)


def test_rows_come_in_the_order_they_are_asked_for(folder: str) -> None:
    columns = Rows(folder, "train").read(np.asarray([2, 0, 2]))
    assert columns["tokens"].tolist() == [4, 5, 6, 7, 0, 1, 2, 4, 5, 6, 7]
    assert columns["loss_mask"].tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert columns["lengths"].tolist() == [4, 3, 4]
    assert columns["row_id"].tolist() == [2, 0, 2]


def test_columns_have_the_dtypes_of_a_bundle(folder: str) -> None:
    for indices in ([1, 3], []):
        columns = Rows(folder, "train").read(np.asarray(indices, dtype=np.int64))
        dtypes = {name: str(values.dtype) for name, values in columns.items()}
        assert dtypes == {"tokens": "int32", "lengths": "int32", "loss_mask": "uint8", "row_id": "int64"}


def test_what_is_read_is_a_copy_that_may_be_changed(folder: str) -> None:
    rows = Rows(folder, "train")
    rows.read(np.asarray([0]))["tokens"][:] = 99
    assert rows.read(np.asarray([0]))["tokens"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_split_is_an_error(folder: str, index: int) -> None:
    with pytest.raises(IndexError, match=r"which has rows 0\.\.3"):
        Rows(folder, "train").read(np.asarray([0, index]))


def test_rows_travel_between_processes_as_a_path(folder: str) -> None:
    packed = pickle.dumps(Rows(folder, "train"))
    assert len(packed) < 1000
    assert pickle.loads(packed).read(np.asarray([1]))["tokens"].tolist() == [3]


@pytest.mark.parametrize("name", ARRAYS)
def test_a_damaged_file_is_noticed_on_opening(folder: str, name: str) -> None:
    path = Path(folder) / "train" / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError):
        Rows(folder, "train")


def test_rows_know_their_domains_and_scores_where_the_data_does(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "train", ("domain", "score")) as writer:
        marks = {"domain": np.asarray([7, 1 << 62]), "score": np.asarray([0.5, -2.0], np.float32)}
        writer.write(np.arange(3, dtype=np.int32), np.ones(3, np.uint8), np.asarray([1, 2], np.int32), np.zeros(2, np.int64), marks)
    rows = Rows(str(tmp_path), "train")
    columns = rows.read(np.asarray([1, 0, 1]))
    assert columns["domain"].tolist() == [1 << 62, 7, 1 << 62] and columns["domain"].dtype == np.int64
    assert rows.marks["score"].tolist() == [0.5, -2.0] and "score" not in columns


def test_the_reader_imports_nothing_but_numpy() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'datasets', 'pyarrow', 'pydantic', 'mlflow'}"
    code = f"import sys, orchestrator.rows; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


@settings(deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), max_size=5), max_size=6))
def test_any_rows_survive_the_disk(tmp_path_factory: pytest.TempPathFactory, batches: list[list[list[int]]]) -> None:
    rows = [row for batch in batches for row in batch]
    folder = tmp_path_factory.mktemp("rows")
    with RowWriter(folder / "held_out") as writer:
        for batch in batches:
            flat = np.asarray([token for row in batch for token in row], dtype=np.int32)
            lengths = np.asarray([len(row) for row in batch], dtype=np.int32)
            writer.write(flat, np.ones(len(flat), np.uint8), lengths, np.zeros(len(batch), np.int64))
    if not rows:
        return
    read = Rows(str(folder), "held_out")
    assert [read.read(np.asarray([i]))["tokens"].tolist() for i in range(len(read))] == rows
    assert read.lengths.tolist() == [len(row) for row in rows]
