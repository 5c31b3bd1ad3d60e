"""Rows of one bundle laid out as forwards of a causal network: which tokens it reads and where its predictions come out.

A causal network's output at position t-1 predicts token t and sees nothing to its right. So rows are padded on the
right without a mask, and nothing from a row's last predicted token on is read at all. How a bundle is laid out depends
on that bundle alone: other batch shapes would change float32 results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.engines import Columns

Ints = NDArray[np.int64]
PAD_ID = 0
"""Any embedded id does: no prediction sees it."""


@dataclass(frozen=True)
class BundleRows:
    """The rows of a bundle, seen from their loss tokens."""

    tokens: NDArray[np.generic]
    """`(S,)` token ids of all rows."""
    starts: Ints
    """`(R,)` where each row starts in `tokens`."""
    reach: Ints
    """`(R,)` tokens of each row that a network must read; 0 for a row without loss tokens."""
    loss_at: Ints
    """`(N,)` places in `tokens` of the loss tokens."""
    first_loss: Ints
    """`(R+1,)` where each row's loss tokens start among all N."""

    @property
    def labels(self) -> Ints:
        """`(N,)` the loss tokens themselves."""
        return self.tokens[self.loss_at].astype(np.int64)


@dataclass(frozen=True)
class Forward:
    """The arrays of one forward over B sequences of L tokens that predicts n tokens."""

    input_ids: Ints
    """`(B, L)`."""
    position_ids: Ints | None
    """`(B, L)`, restarting at 0 with every row; None when each sequence is a single row."""
    index: Ints
    """`(n,)` places in the flattened `(B*L)` output that predict the loss tokens."""
    order: Ints
    """`(n,)` number of each of them among the bundle's N loss tokens."""


def bundle_rows(columns: Columns) -> BundleRows:
    """`ValueError` when lengths and mask do not fit the tokens, or a row's first token is to be predicted."""
    tokens, lengths, mask = columns["tokens"], columns["lengths"].astype(np.int64), columns["loss_mask"]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    total = int(lengths.sum())
    if total != len(tokens) or len(mask) != len(tokens):
        raise ValueError(f"a bundle of {len(tokens)} tokens: got lengths adding up to {total} and {len(mask)} mask values")
    loss_at = np.flatnonzero(mask)
    row_of = np.searchsorted(ends, loss_at, side="right")
    first_loss = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(lengths)))])
    if (loss_at == starts[row_of]).any():
        raise ValueError("loss_mask: got a row whose first token is to be predicted; nothing precedes it, so clear its mask")
    reach = np.zeros(len(lengths), dtype=np.int64)
    busy = np.flatnonzero(np.diff(first_loss))
    reach[busy] = loss_at[first_loss[busy + 1] - 1] - starts[busy]
    return BundleRows(tokens, starts, reach, loss_at, first_loss)


def group_by_length(lengths: Ints, padded_tokens: int, together: int = 1) -> list[list[int]]:
    """Numbers of the sequences of each forward: longest first, as many together as padding keeps within `padded_tokens`.

    Each run of so many sequences that belong `together` comes whole and in its order, and counts as long as its longest. A run that
    exceeds `padded_tokens` gets a forward of its own; runs of empty sequences get none.
    """
    runs = np.arange(len(lengths)).reshape(-1, together)
    longest = lengths[runs].max(-1)
    groups: list[list[int]] = []
    width = 0
    for number in np.argsort(-longest, kind="stable").tolist():
        length = int(longest[number])
        if length == 0:
            break
        if not groups or (len(groups[-1]) + together) * width > padded_tokens:
            groups.append([])
            width = length
        groups[-1] += runs[number].tolist()
    return groups


def lay_out(rows: BundleRows, sequences: Sequence[Sequence[int]]) -> Forward:
    """The forward whose b-th sequence holds the rows numbered `sequences[b]`, one after another, then padding."""
    width = max(int(sum(rows.reach[r] for r in sequence)) for sequence in sequences)
    packed = any(len(sequence) > 1 for sequence in sequences)
    input_ids = np.full((len(sequences), width), PAD_ID, dtype=np.int64)
    position_ids = np.zeros_like(input_ids) if packed else None
    index, order = [], []
    for b, sequence in enumerate(sequences):
        place = 0
        for r in sequence:
            start, reach = int(rows.starts[r]), int(rows.reach[r])
            input_ids[b, place : place + reach] = rows.tokens[start : start + reach]
            if position_ids is not None:
                position_ids[b, place : place + reach] = np.arange(reach)
            mine = np.arange(rows.first_loss[r], rows.first_loss[r + 1])
            index.append(rows.loss_at[mine] - start - 1 + b * width + place)
            order.append(mine)
            place += reach
    return Forward(input_ids, position_ids, np.concatenate(index), np.concatenate(order))
