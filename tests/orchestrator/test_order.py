"""The order of rows: a bijection by seed, the same for any number of workers, without memory."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator import order as order_module
from orchestrator.bundle import from_table, scalar
from orchestrator.order import Order, deal, rows_at
from orchestrator.reading import read_bundles
from orchestrator.rows import Rows
from tests.prepared import write_split


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """101 train rows and 7 held-out rows of uneven length."""
    home = tmp_path_factory.mktemp("order")
    rng = np.random.default_rng(0)
    write_split(home, "train", rng.integers(2, 40, 101))
    write_split(home, "held_out", rng.integers(2, 40, 7))
    return str(home)


@pytest.mark.parametrize("rows", [1, 2, 3, 101, 1024, 4097])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_visits_each_row_once_in_its_own_order(rows: int, seed: int) -> None:
    epochs = rows_at(np.arange(3 * rows), rows, seed).reshape(3, rows)
    assert (np.sort(epochs) == np.arange(rows)).all()
    if rows > 100:
        assert (epochs[0] != epochs[1]).mean() > 0.9
        assert abs(np.corrcoef(epochs[0], np.arange(rows))[0, 1]) < 0.3


def test_seeds_differ_and_positions_are_independent_of_how_they_are_asked() -> None:
    whole = rows_at(np.arange(5000), 1000, seed=3)
    assert (np.concatenate([rows_at(np.arange(i, i + 50), 1000, 3) for i in range(0, 5000, 50)]) == whole).all()
    assert (rows_at(np.arange(1000), 1000, 4) != whole[:1000]).mean() > 0.9


@pytest.mark.parametrize("settings", [{"batch_rows": 12}, {"batch_tokens": 200}])
def test_a_step_has_the_same_rows_for_any_number_of_bundles(folder: str, settings: dict[str, int]) -> None:
    orders = [Order(folder, seed=1, steps=40, bundles_per_step=n, **settings) for n in (1, 2, 3)]
    for step in (1, 2, 9, 17, 40):
        parts = [np.sort(np.concatenate(o.bundles(step))) for o in orders]
        assert all((p == parts[0]).all() for p in parts)


def test_tokens_of_a_step_stay_within_batch_tokens_and_an_epoch_is_complete(folder: str) -> None:
    order = Order(folder, seed=1, steps=100, bundles_per_step=1, batch_tokens=200)
    steps = order.count_steps(2)
    rows = [order.step_rows(s) for s in range(1, steps + 1)]
    lengths = np.load(Path(folder) / "train" / "lengths.npy")
    assert all(lengths[r].sum() <= 200 for r in rows)
    assert (np.sort(np.concatenate(rows)) == np.repeat(np.arange(101), 2)).all()


def test_late_epochs_cost_what_early_ones_do(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each epoch is laid out once, however many lie before it."""
    order = Order(folder, seed=5, steps=400, bundles_per_step=1, batch_tokens=200)
    laid: list[int] = []
    real = order_module.rows_at

    def counted(positions: NDArray[np.int64], rows: int, seed: int) -> NDArray[np.int64]:
        if len(positions) == rows:
            laid.append(int(positions[0]) // rows)
        return real(positions, rows, seed)

    monkeypatch.setattr(order_module, "rows_at", counted)
    for step in range(1, order.count_steps(10) + 1):
        order.step_rows(step)
    assert max(laid.count(epoch) for epoch in laid) <= 2  # to count its steps, and to walk them


def test_the_last_step_of_an_epoch_run_is_what_is_left(folder: str) -> None:
    order = Order(folder, seed=1, steps=1, bundles_per_step=2, batch_rows=12)
    steps = order.count_steps(1)
    last = Order(folder, seed=1, steps=steps, bundles_per_step=2, batch_rows=12, last_row=101)
    assert steps == 9
    assert len(last.step_rows(9)) == 101 - 8 * 12


def test_dealt_bundles_have_nearly_equal_tokens() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.lognormal(4, 1, 64).astype(np.int32)
    parts = deal(np.arange(64), lengths, 4)
    tokens = np.asarray([lengths[p].sum() for p in parts])
    assert sorted(np.concatenate(parts)) == list(range(64))
    assert tokens.max() / tokens.mean() < 1.3


def test_a_stream_can_start_at_any_step_and_is_the_same_from_there(folder: str) -> None:
    order = Order(folder, seed=5, steps=20, bundles_per_step=2, batch_rows=6)
    whole = [from_table(t) for t in read_bundles(order, 0, 1, with_held_out=False)]
    rest = [from_table(t) for t in read_bundles(order, 13, 2, with_held_out=False)]
    assert [scalar(c, "step") for c in rest] == [s for s in range(14, 21) for _ in range(2)]
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(whole[26:], rest, strict=True))


def test_held_out_bundles_follow_the_first_step_and_divide_evenly_among_ranks(folder: str) -> None:
    order = Order(folder, seed=5, steps=2, bundles_per_step=2, batch_rows=6)
    bundles = [from_table(t) for t in read_bundles(order, 0, 1, with_held_out=True)]
    held_out = [b for b in bundles if scalar(b, "step") == 0]
    assert len(held_out) % 2 == 0
    assert [scalar(b, "step") for b in bundles] == [1, 1] + [0] * len(held_out) + [2, 2]
    assert [scalar(b, "bundle") for b in bundles] == list(range(len(bundles)))
    first = len(Rows(folder, "train"))  # held-out rows are numbered on from those to train on
    assert sorted(np.concatenate([b["row_id"] for b in held_out])) == list(range(first, first + 7))


def test_an_order_of_120_000_steps_takes_no_memory(folder: str) -> None:
    order = Order(folder, seed=5, steps=120_000, bundles_per_step=1, batch_rows=16)
    stream = read_bundles(order, 0, 1, with_held_out=False)
    next(itertools.islice(stream, 200, None))
    tracemalloc.start()
    next(itertools.islice(stream, 2000, None))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1 << 20
