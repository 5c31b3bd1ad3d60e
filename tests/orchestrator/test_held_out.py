"""Setting rows aside: exactly as many as asked, and no document on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.held_out import choose_held_out


def documents(*sizes: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`source_row` of documents of these sizes, with gaps in the numbers where bad records were."""
    return np.repeat(np.arange(len(sizes), dtype=np.int64) * 3 + 2, sizes)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(0, 5), st.data())
def test_the_number_is_exact_and_nothing_is_on_both_sides(sizes: list[int], seed: int, data: st.DataObject) -> None:
    rows = documents(*sizes)
    if len(rows) < 2:
        return
    wanted = data.draw(st.integers(1, len(rows) - 1))
    train, held_out, how = choose_held_out(rows, wanted, seed)
    assert len(held_out) == wanted and len(train) > 0
    assert not set(train) & set(held_out)
    assert np.all(np.diff(train) > 0) and np.all(np.diff(held_out) > 0)
    dropped = len(rows) - len(train) - wanted
    if how == "documents":
        assert not set(rows[train]) & set(rows[held_out])
        assert dropped <= max(wanted, 0.1 * len(rows))
    else:
        assert dropped == 0


def test_rows_that_are_documents_are_drawn_evenly() -> None:
    rows = documents(*[1] * 50)
    counts = np.zeros(50)
    for seed in range(400):
        counts[choose_held_out(rows, 10, seed)[1]] += 1
    assert counts.min() > 40 and counts.max() < 130


def test_the_seed_decides() -> None:
    rows = documents(*[2] * 40)
    again = [choose_held_out(rows, 10, seed)[1].tolist() for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize(
    ("sizes", "wanted", "how"),
    [
        ((1000,), 64, "chunks"),
        ((1000, 1000), 64, "chunks"),
        ((4, 4, 4), 2, "documents"),
        ((3, 3), 4, "chunks"),
        ((100,) * 20, 64, "documents"),
    ],
)
def test_documents_are_kept_whole_unless_that_wastes_too_much(sizes: tuple[int, ...], wanted: int, how: str) -> None:
    assert choose_held_out(documents(*sizes), wanted, 0)[2] == how
