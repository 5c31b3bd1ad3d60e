"""A teacher's own tokens laid on the student's, so that what it computed at them travels in the student's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.aligned import UNTOLD
from strategies.core import Columns
from strategies.stages.judge import loss_counts

Ints = NDArray[np.int64]
NONE = -1
"""At a place where no token of the teacher lies."""


def places(ours: Ints, theirs: Ints) -> tuple[Ints, int]:
    """Where the M tokens of a teacher lie, `(M,)`, among K places of each of the student's N, and K.

    `ours` and `theirs` `(R,)` count the loss tokens of each row on either side. A row's lie one after the other on the places of the
    same row, from its first; K is what the row with the most for each of the student's needs. A row of the teacher's needs one of the
    student's.
    """
    room = np.where(ours > 0, ours, 1)
    each = int(np.ceil(theirs / room).max(initial=1))
    first = (np.cumsum(ours) - ours) * each
    before = np.cumsum(theirs) - theirs
    return np.repeat(first - before, theirs) + np.arange(int(theirs.sum())), each


def laid_states(columns: Columns, shown: Columns, hidden: NDArray[Any], theirs: NDArray[Any]) -> Columns:
    """Of a bundle's `columns` and of its rows as the teacher is `shown` them, whose M loss tokens have `hidden` states `(M*D,)` and the
    spans `theirs` `(M,)`: `hidden` `(N*K*D,)`, and `(N*K,)` int32 each `theirs`, `labels`, its tokens, and `reads`, the tokens before
    them. `NONE` and zeros where none lies."""
    at, each = places(loss_counts(columns), loss_counts(shown))
    size = int(np.count_nonzero(columns["loss_mask"])) * each
    tokens = np.flatnonzero(shown["loss_mask"])
    found = {"theirs": theirs, "labels": shown["tokens"][tokens], "reads": shown["tokens"][tokens - 1]}
    laid: Columns = {}
    for name, values in found.items():
        whole = np.full(size, NONE, np.int32)
        whole[at] = values
        laid[name] = whole
    states = hidden.reshape(len(at), -1) if len(at) else hidden.reshape(0, 0)
    whole_states = np.zeros((size, states.shape[-1]), hidden.dtype)
    whole_states[at] = states
    return laid | {"hidden": whole_states.ravel()}


def followed(shown: Columns) -> NDArray[np.bool_]:
    """`(S',)`: the tokens of a teacher's rows that come right after one that it is asked about."""
    after = np.zeros(len(shown["tokens"]), dtype=np.bool_)
    after[1:] = shown["loss_mask"][:-1] != 0
    ends = np.cumsum(shown["lengths"].astype(np.int64))
    after[ends[ends < len(after)]] = False
    return after


def laid_begins(columns: Columns, shown: Columns, span: NDArray[Any], theirs: NDArray[Any], begins: NDArray[Any]) -> Columns:
    """`begins` `(N,)`: at the student's loss token that comes right after a span the teacher's number of the token that comes right after
    its own, of `begins` `(S',)`; `UNTOLD` where one of the two is not there.

    `span` `(N,)` and `theirs` `(M,)` are the spans of the loss tokens of a bundle's `columns` and of its rows as the teacher is `shown`
    them.
    """
    told = np.full(len(span), UNTOLD, np.float32)
    ours_at, theirs_at = np.flatnonzero(columns["loss_mask"]), np.flatnonzero(shown["loss_mask"])
    ours, others = np.flatnonzero((span != NONE) & _ends(span)), np.flatnonzero(_ends(theirs))
    behind = ours + 1
    there = (behind < len(span)) & (ours_at[np.minimum(behind, len(span) - 1)] == ours_at[ours] + 1)
    next_at = theirs_at[others] + 1
    after = followed(shown)
    there &= (next_at < len(after)) & after[np.minimum(next_at, len(after) - 1)]
    told[behind[there]] = begins[next_at[there]]
    return {"begins": told}


def _ends(span: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of the tokens with these spans is the last of its own."""
    return np.concatenate([span[1:] != span[:-1], np.ones(min(1, len(span)), np.bool_)])
