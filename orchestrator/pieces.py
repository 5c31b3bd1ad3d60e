"""What encoding makes: rows of ids with a mask, or the reason why there is none; and how long rows are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class Bad:
    """Why a record cannot be learnt from. `reason` is one of few, for counting; `detail` is about this record."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Encoded:
    """One record, or a piece of one."""

    tokens: Ids
    """`(T,)`."""
    loss_mask: Mask
    """`(T,)`; 1 where the token is predicted and counted. The first never is."""
    splittable: bool = False


def unpredicted_first(mask: Mask) -> Mask:
    """The mask with its first token not counted: nothing stands before it to predict it from."""
    changed = mask.copy()
    changed[:1] = 0
    return changed


def fit(row: Encoded, limit: int, overlong: Literal["split", "truncate", "quarantine"]) -> list[Encoded] | Bad:
    """The row in pieces of at most `limit` tokens that each have a token to predict; pieces without one are left out."""
    size = len(row.tokens)
    if size <= limit:
        pieces = [row]
    elif overlong == "truncate":
        pieces = [Encoded(row.tokens[:limit], row.loss_mask[:limit])]
    elif overlong == "split" and row.splittable:
        starts = range(0, size, limit)
        pieces = [Encoded(row.tokens[i : i + limit], unpredicted_first(row.loss_mask[i : i + limit])) for i in starts]
    else:
        return Bad("longer than max_length_tokens", f"{size} tokens")
    kept = [piece for piece in pieces if piece.loss_mask.any()]
    return kept or Bad("no token to learn from within max_length_tokens")


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded; JSON may carry lone surrogates, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
