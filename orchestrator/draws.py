"""Which rows a step draws under a curriculum: how many of each domain, and from which share of its rows, the easiest first.

The rows of a step depend on seed, step, the values of controllers that are due for it and what was drawn before, which is the cursor:
a few numbers that travel with the bundles, lie in every checkpoint, and with which a stream goes on. Imports neither torch nor a
strategy, because the process that reads rows starts with it; what a recipe says is tabulated by `orchestrator.curricula`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.order import rows_at
from orchestrator.rows import Rows

CURRICULUM = "curriculum/"
"""Before the names of a cursor's numbers among the columns of a bundle, each `(1,)` float64."""
DRAWN, OWED = "drawn/", "owed/"
"""Before the name of a pool: rows that it has given, and what it lags behind its share of them."""
OPEN_SHARE = "open"
"""The share of rows that may be drawn, among the columns."""
ALL = "rows"
"""Name of the pool where there is one."""
BEGINNING: Mapping[str, float] = {}
"""The cursor before the first step."""
NOT_SORTED, BY_CHANCE = "", "random"


@dataclass(frozen=True)
class Draws:
    """The curriculum of one run. A pool is what rows are drawn from: a domain, or all rows."""

    pools: tuple[str, ...] = (ALL,)
    domains: tuple[int, ...] = ()
    """Number of each pool's domain (`strategies.domains`); nothing where the pool is all rows."""
    shares: NDArray[np.float32] | str = ""
    """Share of each pool by step, `(steps, pools)`, or `(1, pools)` for all steps; or the name of a controller that tells it."""
    open: NDArray[np.float64] | str | None = None
    """Share of rows that may be drawn by step, `(steps,)` or `(1,)`; or the name of a controller. None opens all."""
    sort_by: str = NOT_SORTED
    """What makes rows easy: the name of a file of theirs such as `lengths` or `score`, or `random`."""
    descending: bool = False

    def take(
        self, folder: str, seed: int, step: int, batch_rows: int, values: Mapping[str, float], cursor: Mapping[str, float]
    ) -> tuple[NDArray[np.int64], dict[str, float]]:
        """Row numbers of a step `(batch_rows,)`, and the cursor behind it. `values` are those of controllers."""
        shares, opened = self.shares_at(step, values), self.open_at(step, values)
        owed = [cursor.get(OWED + name, 0.0) + batch_rows * share for name, share in zip(self.pools, shares, strict=True)]
        counts = _whole(owed, batch_rows)
        after: dict[str, float] = {OPEN_SHARE: opened}
        rows = []
        for number, (name, count) in enumerate(zip(self.pools, counts, strict=True)):
            first = int(cursor.get(DRAWN + name, 0))
            rows.append(self.drawn(folder, seed, number, first, count, opened))
            after |= {DRAWN + name: float(first + count), OWED + name: owed[number] - count}
        return np.concatenate(rows), after

    def drawn(self, folder: str, seed: int, pool: int, first: int, count: int, opened: float) -> NDArray[np.int64]:
        """`count` draws of a pool from the `first` on: while as many rows are open, each comes once before any comes again."""
        rows = _sorted_rows(folder, self.domains[pool] if self.domains else None, self.sort_by, self.descending, seed)
        within = min(len(rows), max(1, int(np.ceil(opened * len(rows) - 1e-9))))
        key = seed + (self.domains[pool] if self.domains else 0)
        return rows[rows_at(np.arange(first, first + count), within, key)]

    def shares_at(self, step: int, values: Mapping[str, float]) -> list[float]:
        """Of each pool at a step (from 1), adding up to 1."""
        if isinstance(self.shares, str):
            given = [values[f"{self.shares}/{name}"] for name in self.pools] if self.shares else [1.0]
        else:
            given = self.shares[min(step, len(self.shares)) - 1].astype(np.float64).tolist()
        whole = sum(given)
        if not whole > 0 or min(given) < 0:
            raise ValueError(f"step {step}: got shares {given} of {', '.join(self.pools)}; expected none below 0 and one above")
        return [share / whole for share in given]

    def open_at(self, step: int, values: Mapping[str, float]) -> float:
        """The share of rows that may be drawn at a step (from 1)."""
        if self.open is None:
            return 1.0
        return float(values[self.open] if isinstance(self.open, str) else self.open[min(step, len(self.open)) - 1])

    def example(self, folder: str, seed: int, step: int, batch_rows: int) -> NDArray[np.int64]:
        """Rows such as a step may have whatever controllers say, all of one pool in turn; the longest first where it is not yet known
        what sorts them."""
        opened = (1 + step % 5) / 5 if isinstance(self.open, str) else self.open_at(step, {})
        if self.sort_by not in (NOT_SORTED, BY_CHANCE) and not _file(folder, self.sort_by).exists():
            return replace(self, sort_by="lengths", descending=True).example(folder, seed, step, batch_rows)
        return self.drawn(folder, seed, step % len(self.pools), step * batch_rows, batch_rows, opened)


def cursor_columns(cursor: Mapping[str, float]) -> dict[str, NDArray[np.float64]]:
    """A cursor as columns of a bundle."""
    return {CURRICULUM + name: np.asarray([value], dtype=np.float64) for name, value in cursor.items()}


def cursor_of(columns: Mapping[str, NDArray[np.generic]]) -> dict[str, float]:
    """The cursor behind the step of a bundle; nothing without a curriculum."""
    return {name.removeprefix(CURRICULUM): float(values[0]) for name, values in columns.items() if name.startswith(CURRICULUM)}


def drawn_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What is logged of a step between two cursors: the `open` share of rows, and the `share/<pool>` that each of several gave."""
    counts = {name.removeprefix(DRAWN): value - before.get(name, 0.0) for name, value in after.items() if name.startswith(DRAWN)}
    shares = {f"share/{name}": count / sum(counts.values()) for name, count in counts.items()} if len(counts) > 1 else {}
    return shares | {name: value for name, value in after.items() if name == OPEN_SHARE}


def _whole(owed: Sequence[float], rows: int) -> list[int]:
    """Whole numbers of rows that add up to `rows`, close to what is owed; the most owed comes first, the first of equal ones."""
    counts = [max(0, int(np.floor(o))) for o in owed]
    while sum(counts) < rows:
        counts[max(range(len(owed)), key=lambda i: owed[i] - counts[i])] += 1
    while sum(counts) > rows:
        given = [i for i in range(len(owed)) if counts[i]]
        counts[min(given, key=lambda i: owed[i] - counts[i])] -= 1
    return counts


@lru_cache(maxsize=256)
def _sorted_rows(folder: str, domain: int | None, sort_by: str, descending: bool, seed: int) -> NDArray[np.int64]:
    """Row numbers of a pool, the easiest first; equal ones by chance, and so all where nothing sorts them."""
    train = _open(folder)
    found = np.arange(len(train)) if domain is None else np.flatnonzero(train.marks["domain"] == domain)
    if not len(found):
        raise ValueError(f"no row of {folder} is of domain {domain}")
    if sort_by == NOT_SORTED:
        return found
    found = found[rows_at(np.arange(len(found)), len(found), seed ^ 0x5EED)]
    if sort_by == BY_CHANCE:
        return found
    scores = np.load(_file(folder, sort_by), mmap_mode="r")[found]
    return found[np.argsort(-scores if descending else scores, kind="stable")]


def _file(folder: str, name: str) -> Path:
    return Path(folder) / "train" / f"{name}.npy"


@lru_cache(maxsize=4)
def _open(folder: str) -> Rows:
    return Rows(folder, "train")
