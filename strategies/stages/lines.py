"""Rows of a bundle one by one, with what is known of those that a student wrote, and back to flat columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.core import Columns
from strategies.domains import DOMAIN

ROWS = frozenset({"tokens", "lengths", "loss_mask", "row_id"})
"""Columns of rows."""
NOBODY = -1
"""`written_by` of a row of the data's own."""


@dataclass(frozen=True)
class Line:
    """One row."""

    tokens: NDArray[np.generic]
    loss_mask: NDArray[np.generic]
    row_id: int
    behaviour: NDArray[np.generic]
    """Log-probabilities of its loss tokens at temperature 1 under the weights that wrote them, 0 where nobody did."""
    reference: NDArray[np.generic]
    """The row's own completion."""
    sample: int = 0
    finished: bool = True
    written_by: int = NOBODY
    """Finished steps of the student that wrote it."""
    domain: int = 0
    """Number of its domain, where the data has domains."""

    @property
    def written(self) -> bool:
        """Whether somebody wrote it for this run."""
        return self.written_by != NOBODY


LINE_COLUMNS = frozenset({"written", "sample", "finished", "written_by", "behaviour", "reference", "reference_lengths"})
"""The others that rows have behind a stage that writes."""
ATTEMPT = "attempt/"
"""Begins the names of columns about what the student wrote, where a later stage puts other rows in the place of its texts."""


def joined(lines: Sequence[Line]) -> Columns:
    """Lines as flat columns."""

    def flat(values: list[NDArray[np.generic]], dtype: type[np.generic]) -> NDArray[np.generic]:
        return np.concatenate([np.zeros(0, dtype), *values]).astype(dtype, copy=False)

    return {
        "tokens": flat([line.tokens for line in lines], np.int32),
        "lengths": np.asarray([len(line.tokens) for line in lines], dtype=np.int32),
        "loss_mask": flat([line.loss_mask for line in lines], np.uint8),
        "row_id": np.asarray([line.row_id for line in lines], dtype=np.int64),
        "behaviour": flat([line.behaviour for line in lines], np.float32),
        "reference": flat([line.reference for line in lines], np.int32),
        "reference_lengths": np.asarray([len(line.reference) for line in lines], dtype=np.int32),
        "written": np.asarray([line.written for line in lines], dtype=np.uint8),
        "sample": np.asarray([line.sample for line in lines], dtype=np.int32),
        "finished": np.asarray([line.finished for line in lines], dtype=np.uint8),
        "written_by": np.asarray([line.written_by for line in lines], dtype=np.int64),
    }


def replaced(columns: Columns, lines: Sequence[Line]) -> Columns:
    """A bundle with other rows, each of which keeps its domain where the bundle has domains."""
    others = {name: values for name, values in columns.items() if name not in ROWS | LINE_COLUMNS}
    domains = {DOMAIN: np.asarray([line.domain for line in lines], dtype=np.int64)} if DOMAIN in columns else {}
    return {**others, **joined(lines), **domains}


def lines_of(columns: Columns) -> list[Line]:
    """The lines that were `joined`. Rows as the data has them, without those columns, have nothing that is known of a writer."""
    tokens, masks = (split(columns[name], columns["lengths"]) for name in ("tokens", "loss_mask"))
    row_ids = columns["row_id"].tolist()
    domains = columns[DOMAIN].tolist() if DOMAIN in columns else [0] * len(row_ids)
    counts = np.asarray([np.count_nonzero(m) for m in masks], dtype=np.int64)
    if "written_by" not in columns:
        nothing = np.zeros(0, np.int32)
        rows = zip(tokens, masks, row_ids, counts.tolist(), domains, strict=True)
        return [Line(t, m, r, np.zeros(n, np.float32), nothing, domain=d) for t, m, r, n, d in rows]
    behaviour, references = split(columns["behaviour"], counts), split(columns["reference"], columns["reference_lengths"])
    told = (columns[name].tolist() for name in ("sample", "finished", "written_by"))
    every = zip(tokens, masks, row_ids, behaviour, references, *told, domains, strict=True)
    return [Line(t, m, r, b, ref, sample, bool(finished), by, d) for t, m, r, b, ref, sample, finished, by, d in every]


def split(values: NDArray[np.generic], lengths: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    """Pieces of flat `values` (S,), one of each of the `lengths` (R,)."""
    return np.split(values, np.cumsum(lengths.astype(np.int64))[:-1]) if len(lengths) else []
