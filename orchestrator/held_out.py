"""Which rows are set aside for evaluation when they have no source of their own."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

WASTE_SHARE = 0.1
"""Share of all rows that keeping documents whole may cost before chunks are held out instead."""


def choose_held_out(
    source_row: NDArray[np.int64], wanted: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Literal["documents", "chunks"]]:
    """Indices of rows to train on and of exactly `wanted` < R rows to hold out, both rising.

    `source_row` (R,) says, rising, of which document each row is a part. Documents are taken in seeded order as long as they
    fit; if none fits any more the shortest left over is cut and its rest stands on neither side. Chunks are chosen instead
    when that rest is more than `wanted` and than `WASTE_SHARE` of all rows, or nothing would be left to train on.
    """
    starts = np.flatnonzero(np.diff(source_row, prepend=source_row[:1] - 1))
    sizes = np.diff(starts, append=len(source_row))
    order = np.random.default_rng(seed).permutation(len(starts))
    taken, left = [], wanted
    for document in order.tolist():
        if sizes[document] <= left:
            taken.append(document)
            left -= int(sizes[document])
        if left == 0:
            break
    if left:
        others = order[~np.isin(order, taken)]
        taken.append(int(others[np.argmin(sizes[others])]))
        waste = int(sizes[taken[-1]]) - left
    else:
        waste = 0
    if len(taken) == len(starts) or waste > max(wanted, WASTE_SHARE * len(source_row)):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(source_row))[:wanted])
        return np.setdiff1d(np.arange(len(source_row)), chosen), chosen, "chunks"
    lasts = sizes[taken] - np.asarray([0] * (len(taken) - 1) + [waste])
    chosen = np.sort(np.concatenate([np.arange(starts[d], starts[d] + n) for d, n in zip(taken, lasts, strict=True)]))
    whole = np.isin(np.repeat(np.arange(len(starts)), sizes), taken)
    return np.flatnonzero(~whole), chosen, "documents"
