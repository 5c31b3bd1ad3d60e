"""What stands between the turns that are learnt, as a teacher's own chat template lays it out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import PreparedData
from orchestrator.rows import Rows, Split
from strategies.core import Columns

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Turns:
    """The same conversations twice: rows of the student, and rows that a teacher's tokenizer and template made of the same records."""

    ours: str
    """Folder of prepared rows."""
    theirs: str
    one_source: bool
    """Whether held-out rows come from the source of the others, so that a record may stand in another split for the teacher."""

    @classmethod
    def of(cls, ours: PreparedData, theirs: PreparedData) -> Turns:
        return cls(ours.folder, theirs.folder, ours.held_out_by != "source")

    def between(self, columns: Columns) -> list[list[Ints]]:
        """Of every row of the bundle the teacher's ids before each run of learnt tokens; nothing of a record that it has no row of."""
        return [self._row(*self._record(row_id)) for row_id in columns["row_id"].tolist()]

    def _record(self, row_id: int) -> tuple[Split, int]:
        """Where a row comes from: held-out rows are numbered on from those to train on."""
        train, held_out = self._own
        if row_id < len(train):
            return "train", int(train.source_row[row_id])
        return "held_out", int(held_out.source_row[row_id - len(train)])

    def _row(self, split: Split, record: int) -> list[Ints]:
        for name in ("train", "held_out") if self.one_source else (split,):
            rows, order, sorted_records = self._index[name]
            at = int(np.searchsorted(sorted_records, record))
            if at < len(order) and sorted_records[at] == record:
                found = rows.read(order[at : at + 1])
                return _before_learnt(found["tokens"].astype(np.int64), found["loss_mask"])
        return []

    @cached_property
    def _own(self) -> tuple[Rows, Rows]:
        """The student's rows to train on, and held-out ones."""
        return Rows(self.ours, "train"), Rows(self.ours, "held_out")

    @cached_property
    def _index(self) -> dict[str, tuple[Rows, Ints, Ints]]:
        """By split: the teacher's rows, their numbers in order of their records, and those records."""
        found: dict[str, tuple[Rows, Ints, Ints]] = {}
        splits: tuple[Split, ...] = ("train", "held_out")
        for split in splits:
            rows = Rows(self.theirs, split)
            order = np.argsort(rows.source_row, kind="stable")
            found[split] = rows, order, rows.source_row[order]
        return found


def _before_learnt(tokens: Ints, mask: NDArray[np.generic]) -> list[Ints]:
    """The unlearnt tokens before each run of learnt ones."""
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return [tokens[a:b] for a, b in zip([0, *ends[:-1].tolist()], begins.tolist(), strict=True)]
