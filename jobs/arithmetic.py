"""Word problems in arithmetic with worked steps and an answer that can be judged: as many as one wants, of either of two splits.

A problem is a start and two or three events, and one line of working for each: `14+23=37`. Its last line is `#### 37`, as in GSM8K
(arXiv:2110.14168). All totals are from 1 to 99. A problem's numbers and operations are its *sum*; names, things and wording are its
clothes. The sum alone decides the split, so no sum of a held-out problem is ever trained on, whatever it wears.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "held_out"]
Operation = Literal["+", "-", "*"]

HELD_OUT_ONE_IN = 8
"""One sum in so many is held out."""
LARGEST = 99
"""Total that is never exceeded."""
NUMBERS: dict[Operation, range] = {"+": range(2, 20), "-": range(2, 20), "*": range(2, 10)}
"""Of events; a start may be as large as a total."""
FEWEST_EVENTS, MOST_EVENTS = 2, 3

PEOPLE = ("Ana", "Ben", "Cora", "Dan", "Eve", "Finn", "Gina", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "toys")
EVENTS: dict[Operation, tuple[str, ...]] = {
    "+": ("buys {n}", "finds {n}", "makes {n}", "gets {n} from {other}"),
    "-": ("loses {n}", "sells {n}", "breaks {n}", "gives {n} to {other}"),
    "*": ("then has {n} times as many", "makes it {n} times as many"),
}


@dataclass(frozen=True)
class Sum:
    """What is computed: `start`, then one operation after another on what there is."""

    start: int
    events: tuple[tuple[Operation, int], ...]

    @property
    def key(self) -> str:
        return str(self.start) + "".join(f"{operation}{n}" for operation, n in self.events)

    @property
    def split(self) -> Split:
        """The same on every machine."""
        return "held_out" if zlib.crc32(self.key.encode()) % HELD_OUT_ONE_IN == 0 else "train"

    def steps(self) -> Iterator[tuple[int, Operation, int, int]]:
        """What there was, the operation, its number, and what there is then."""
        total = self.start
        for operation, n in self.events:
            before, total = total, _result(total, operation, n)
            yield before, operation, n, total


@dataclass(frozen=True)
class Problem:
    """One row of the data."""

    sum: Sum
    prompt: str
    completion: str
    """A line for each step, then `#### ` and the answer."""

    @property
    def row(self) -> dict[str, str]:
        """What a data source holds of it."""
        return {"prompt": self.prompt, "completion": self.completion}


def problems(split: Split, seed: int = 0) -> Iterator[Problem]:
    """Problems of `split` without end, no sum twice; the same for a seed."""
    random = Random(f"arithmetic {split} {seed}")
    seen: set[str] = set()
    while True:
        drawn = _sum(random)
        if drawn.split == split and drawn.key not in seen:
            seen.add(drawn.key)
            yield Problem(drawn, _story(drawn, random), _working(drawn))


def _sum(random: Random) -> Sum:
    start = total = random.randint(2, LARGEST)
    events: list[tuple[Operation, int]] = []
    for _ in range(random.randint(FEWEST_EVENTS, MOST_EVENTS)):
        operation, n = random.choice([(o, n) for o in EVENTS for n in NUMBERS[o] if 1 <= _result(total, o, n) <= LARGEST])
        total = _result(total, operation, n)
        events.append((operation, n))
    return Sum(start, tuple(events))


def _result(total: int, operation: Operation, n: int) -> int:
    return {"+": total + n, "-": total - n, "*": total * n}[operation]


def _story(drawn: Sum, random: Random) -> str:
    (name, other), thing = random.sample(PEOPLE, 2), random.choice(THINGS)
    said = [f"{name} has {drawn.start} {thing}"]
    said += [random.choice(EVENTS[operation]).format(n=n, other=other) for operation, n in drawn.events]
    return f"{', '.join(said)}. How many now?\n"


def _working(drawn: Sum) -> str:
    steps = list(drawn.steps())
    lines = [f"{before}{operation}{n}={after}" for before, operation, n, after in steps]
    return "\n".join([*lines, f"#### {steps[-1][3]}"])
