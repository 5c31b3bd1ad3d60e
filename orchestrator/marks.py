"""What data says of its rows beside what they are made from: to which domain each belongs, and a number such as how hard it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.pieces import Bad
from orchestrator.rows import MARKS, Rows
from orchestrator.settings import DataConfig
from strategies.domains import domain_id


@dataclass(frozen=True)
class Marks:
    """Of one record; None where the data does not tell."""

    domain: str | None = None
    score: float | None = None


def marked(config: DataConfig) -> tuple[str, ...]:
    """Those of `orchestrator.rows.MARKS` that rows of this data have."""
    return tuple(name for name, column in (("domain", config.domain_column), ("score", config.score)) if column is not None)


def marks_of(record: Mapping[str, object], config: DataConfig) -> Marks | Bad:
    """What a record says of itself, or why it does not."""
    domain = score = None
    if config.domain_column is not None:
        value = record.get(config.domain_column)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            return Bad("no domain", f"{config.domain_column}: {value!r}, expected a word or a whole number")
        domain = str(value)
    if config.score is not None:
        value = record.get(config.score)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(np.float32(value)):
            return Bad("no score", f"{config.score}: {value!r}, expected a number")
        score = float(value)
    return Marks(domain, score)


def mark_arrays(rows: Sequence[Marks], names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """The marks called `names` of R rows, each `(R,)`, of the dtypes in `orchestrator.rows.MARKS`."""
    values = {"domain": [domain_id(m.domain or "") for m in rows], "score": [m.score or 0.0 for m in rows]}
    return {name: np.asarray(values[name], dtype=MARKS[name]) for name in names}


def domain_counts(rows: Rows, names: Mapping[int, str]) -> dict[str, int]:
    """Rows of each domain, by its name; nothing where the data has no domains."""
    found, counts = np.unique(rows.marks.get("domain", np.zeros(0, np.int64)), return_counts=True)
    return dict(sorted((names[number], count) for number, count in zip(found.tolist(), counts.tolist(), strict=True)))
