"""What steps draw under a curriculum: shares that are exact in the long run, each row once before any comes again, and a cursor."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bundle import from_table, scalar
from orchestrator.draws import BY_CHANCE, Draws, _whole, cursor_columns, cursor_of, drawn_metrics
from orchestrator.order import Order
from orchestrator.reading import read_bundles
from orchestrator.row_losses import row_means
from strategies.core import Columns
from strategies.domains import domain_id
from tests.prepared import write_split

ROWS = {"code": 30, "prose": 50, "maths": 21}
NAMES = tuple(ROWS)
DOMAINS = tuple(map(domain_id, NAMES))
EVEN = np.full((1, 3), 1 / 3, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """101 train rows of three domains, mixed, of uneven length and with a score; 9 held-out rows."""
    home, rng = tmp_path_factory.mktemp("draws"), np.random.default_rng(0)
    for split, count in (("train", 101), ("held_out", 9)):
        write_split(home, split, rng.integers(2, 40, count))
        kinds = rng.permutation(np.repeat(DOMAINS, list(ROWS.values())))[:count]
        np.save(home / split / "domain.npy", kinds.astype(np.int64))
        np.save(home / split / "score.npy", rng.normal(size=count).astype(np.float32))
    return str(home)


def kinds(folder: str) -> np.ndarray:
    return np.asarray(np.load(Path(folder) / "train" / "domain.npy"))


def drawn(folder: str, draws: Draws, steps: int, batch_rows: int = 8, seed: int = 3) -> list[np.ndarray]:
    """Rows of each step."""
    found, cursor = [], {}
    for step in range(1, steps + 1):
        rows, cursor = draws.take(folder, seed, step, batch_rows, {}, cursor)
        found.append(rows)
    return found


def test_every_row_of_a_domain_comes_once_before_any_comes_again(folder: str) -> None:
    steps = drawn(folder, Draws(NAMES, DOMAINS, np.asarray([[0.5, 0.3, 0.2]], np.float32)), 200)
    stream = np.concatenate(steps)
    for name, number in zip(NAMES, DOMAINS, strict=True):
        own = stream[kinds(folder)[stream] == number]
        whole = own[: len(own) // ROWS[name] * ROWS[name]].reshape(-1, ROWS[name])
        assert len(whole) >= 6 and (np.sort(whole) == np.flatnonzero(kinds(folder) == number)).all()
        assert (whole[0] != whole[1]).any()


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.01, 0.01, 0.98], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
@pytest.mark.parametrize("batch_rows", [1, 8])
def test_shares_are_kept_within_a_row(folder: str, shares: list[float], batch_rows: int) -> None:
    steps = drawn(folder, Draws(NAMES, DOMAINS, np.asarray([shares], np.float32)), 150, batch_rows)
    counts = np.cumsum([[np.count_nonzero(kinds(folder)[rows] == number) for number in DOMAINS] for rows in steps], axis=0)
    assert all(len(rows) == batch_rows for rows in steps)
    target = np.arange(1, 151)[:, None] * batch_rows * np.asarray(shares)
    assert np.abs(counts - target).max() <= 1 + 1e-3


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 9), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_shares_that_move_never_owe_much(pools: int, batch_rows: int, seed: int) -> None:
    rng, owed = np.random.default_rng(seed), [0.0] * pools
    for _ in range(60):
        owed = [o + batch_rows * s for o, s in zip(owed, rng.dirichlet(np.full(pools, 0.3)), strict=True)]
        counts = _whole(owed, batch_rows)
        assert sum(counts) == batch_rows and min(counts) >= 0
        owed = [o - c for o, c in zip(owed, counts, strict=True)]
        assert max(map(abs, owed)) < 3, "and what is owed does not add up"


def test_a_table_of_shares_is_read_by_step(folder: str) -> None:
    table = np.asarray([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    steps = drawn(folder, Draws(NAMES, DOMAINS, table), 4)
    assert [set(kinds(folder)[rows].tolist()) for rows in steps] == [{DOMAINS[i]} for i in (0, 1, 2, 2)]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort_by", ["lengths", "score"])
def test_only_the_easiest_share_is_open_and_comes_whole(folder: str, sort_by: str, descending: bool) -> None:
    pace = np.repeat(np.asarray([0.25, 1.0]), 13)
    steps = drawn(folder, Draws(open=pace, sort_by=sort_by, descending=descending), 26)
    scores = np.load(Path(folder) / "train" / f"{sort_by}.npy") * (-1.0 if descending else 1.0)
    first = np.concatenate(steps[:13])
    assert len(set(first[:26].tolist())) == 26 == int(np.ceil(0.25 * 101))
    assert scores[first].max() == np.sort(scores)[25]
    assert set(np.concatenate(steps).tolist()) > set(first.tolist())


def test_the_easiest_of_each_domain_are_open_and_what_is_open_grows(folder: str) -> None:
    pace = np.linspace(0.1, 1.0, 40)
    steps = drawn(folder, Draws(NAMES, DOMAINS, EVEN, pace, "lengths"), 40)
    lengths = np.load(Path(folder) / "train" / "lengths.npy")
    for step, number in itertools.product(range(40), DOMAINS):
        of_domain = np.sort(lengths[kinds(folder) == number])
        mine = steps[step][kinds(folder)[steps[step]] == number]
        assert lengths[mine].max(initial=0) <= of_domain[int(np.ceil(pace[step] * len(of_domain) - 1e-9)) - 1]


def test_a_control_by_chance_has_the_same_pace_and_no_order(folder: str) -> None:
    pace = np.asarray([0.3])
    first = np.unique(np.concatenate(drawn(folder, Draws(open=pace, sort_by=BY_CHANCE), 40)))
    lengths = np.load(Path(folder) / "train" / "lengths.npy")
    assert len(first) == 31 and abs(lengths[first].mean() - lengths.mean()) < 5
    other = np.unique(np.concatenate(drawn(folder, Draws(open=pace, sort_by=BY_CHANCE), 40, seed=4)))
    assert set(first.tolist()) != set(other.tolist())


def gate(attempt: int, step: int) -> dict[str, float]:
    """What controllers say to a step."""
    weights = np.random.default_rng(step).dirichlet(np.ones(3))
    return {f"mixture/{name}": float(w) for name, w in zip(NAMES, weights, strict=True)} | {"pace": 0.2 + 0.02 * step}


LISTENING = Draws(NAMES, DOMAINS, "mixture", "pace", "lengths")


def walk(folder: str, workers: int, start: int = 0, cursor: dict[str, float] | None = None) -> dict[int, list[Columns]]:
    """Bundles of each step of a stream that begins after `start`."""
    order = Order(folder, seed=5, steps=30, bundles_per_step=workers, batch_rows=8, draws=LISTENING)
    bundles = [from_table(table) for table in read_bundles(order, start, 1, start == 0, gate, cursor or {})]
    assert len({frozenset(b) for b in bundles}) == 1, "all bundles have the same columns"
    found: dict[int, list[Columns]] = {}
    for bundle in bundles:
        found.setdefault(scalar(bundle, "step"), []).append(bundle)
    return found


def row_ids(bundles: list[Columns]) -> list[int]:
    return sorted(np.concatenate([b["row_id"] for b in bundles]).tolist())


def test_a_stream_that_goes_on_from_any_step_draws_what_one_that_never_stopped_does(folder: str) -> None:
    whole = walk(folder, 1)
    assert list(whole) == [1, 0, *range(2, 31)]
    for stopped in (1, 7, 29):
        cursor = json.loads(json.dumps(cursor_of(whole[stopped][0])))
        again = walk(folder, 1, stopped, cursor)
        assert list(again) == list(range(stopped + 1, 31))
        for step, (bundle,) in again.items():
            (expected,) = whole[step]
            assert all(np.array_equal(bundle[name], values) for name, values in expected.items() if name != "bundle"), step


def test_any_number_of_workers_gets_the_same_rows_and_the_same_cursor(folder: str) -> None:
    one, two = walk(folder, 1), walk(folder, 2)
    for step in range(1, 31):
        assert row_ids(one[step]) == row_ids(two[step])
        assert len({json.dumps(cursor_of(b)) for b in (*one[step], *two[step])}) == 1


def test_steps_tell_what_they_drew(folder: str) -> None:
    bundles, before = walk(folder, 1), {}
    for step in range(1, 31):
        (bundle,) = bundles[step]
        found = drawn_metrics(before, before := cursor_of(bundle))
        told = {f"share/{n}": np.count_nonzero(bundle["domain"] == d) / 8 for n, d in zip(NAMES, DOMAINS, strict=True)}
        assert found == pytest.approx(told | {"open": 0.2 + 0.02 * step})
    assert drawn_metrics({}, {}) == {} and drawn_metrics({}, {"drawn/rows": 8.0, "owed/rows": 0.0, "open": 0.5}) == {"open": 0.5}
    assert cursor_of(cursor_columns({"drawn/a": 3.0})) == {"drawn/a": 3.0}


def test_shares_that_say_nothing_are_an_error(folder: str) -> None:
    for shares in ([0.0, 0.0, 0.0], [0.5, 0.6, -0.1], [float("nan")] * 3):
        with pytest.raises(ValueError, match="expected none below 0 and one above"):
            drawn(folder, Draws(NAMES, DOMAINS, np.asarray([shares], np.float32)), 1)


def test_losses_of_rows_are_means_over_their_loss_tokens() -> None:
    means = row_means(np.asarray([1.0, 2.0, 6.0, 4.0]), np.asarray([0, 1, 1, 0, 1, 0, 1, 0]), np.asarray([3, 2, 3], np.int32))
    assert means.tolist() == [1.5, 6.0, 4.0]


def test_rows_are_sorted_by_any_file_of_theirs_and_examples_come_before_it_is_there(folder: str, tmp_path: Path) -> None:
    home = str(shutil.copytree(folder, tmp_path / "copy"))
    lengths = np.load(Path(home) / "train" / "lengths.npy")
    by_loss = Draws(open=np.asarray([0.2]), sort_by="loss-1234")
    assert lengths[by_loss.example(home, 3, 1, 8)].min() >= np.sort(lengths)[-21], "the longest, while nobody knows what is easy"
    losses = np.random.default_rng(2).normal(size=101).astype(np.float32)
    np.save(Path(home) / "train" / "loss-1234.npy", losses)
    found = np.unique(np.concatenate(drawn(home, by_loss, 6)))
    assert found.tolist() == np.sort(np.argsort(losses)[:21]).tolist()


def test_examples_are_of_every_domain_and_of_what_may_be_open(folder: str) -> None:
    order = Order(folder, seed=5, steps=30, bundles_per_step=2, batch_rows=8, draws=LISTENING)
    found = [np.concatenate(order.example(step)) for step in range(1, 16)]
    assert {tuple(set(kinds(folder)[rows].tolist())) for rows in found} == {(d,) for d in DOMAINS}
    plain = replace(order, draws=None)
    assert all((a == b).all() for a, b in zip(plain.example(4), plain.bundles(4), strict=True))
