"""Rows of a finished store by their ids, checked against the rows they are read for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cluster.codecs import Arrays
from cluster.engines import Columns
from cluster.stores.files import StoreFiles
from cluster.stores.parts import Part, row_hashes


@dataclass
class StoreReader:
    """Random access to all rows; parts are opened when first asked for and stay mapped."""

    files: StoreFiles
    _open: dict[int, Part] = field(default_factory=dict)

    def read(self, columns: Columns) -> tuple[Arrays, float]:
        """The encoded answers about a bundle's loss tokens in their order, and the largest mass dropped where they come from.

        `StoreDamaged` names a row that was scored with other ids, or bytes that are not those that were written.
        """
        starts = np.asarray(self.files.spec.starts)
        ids = columns["row_id"].astype(np.int64)
        homes = np.searchsorted(starts, ids, side="right") - 1
        hashes = row_hashes(columns)
        rows = [
            self._part(home).row(row_id - int(starts[home]), row_id, row_hash)
            for home, row_id, row_hash in zip(homes.tolist(), ids.tolist(), hashes.tolist(), strict=True)
        ]
        dropped = max((self.files.parts[h].dropped_mass for h in set(homes.tolist())), default=0.0)
        if not rows:
            none = self._part(0).nothing()
            return none, 0.0
        return {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}, dropped

    def _part(self, number: int) -> Part:
        if number not in self._open:
            self._open[number] = self.files.open(self.files.parts[number])
        return self._open[number]
