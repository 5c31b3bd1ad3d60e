"""Rows of the student as bytes on one tape, cut into runs of text and special tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.token_bytes import TokenBytes
from strategies.core import Columns
from strategies.stages.align import NONE, Ints

UNREAD = 3
"""Bytes at most of a character that began before its row."""


@dataclass(frozen=True)
class Piece:
    """A run of text of a row, or one special token."""

    row: int
    start: int
    """Place where it begins."""
    end: int
    text: str | None
    """None of a special token."""
    token: int = NONE
    first: bool = False
    """Whether it begins its row."""
    run: int = 0
    """Number of the run of learnt tokens of its row that it is in, or that was before it; -1 before the first."""
    begins_run: bool = False
    """Whether it is the first piece of such a run."""
    learnt: bool = False
    """Whether it is in a run of learnt tokens."""


@dataclass(frozen=True)
class Tape:
    """Places of a bundle (see `Reading`): bytes, and one place for each token that is no text."""

    bytes_: NDArray[np.uint8]
    ends: Ints
    """`(S,)` of the student's tokens."""
    plain: NDArray[np.bool_]
    """`(S,)` whether a token is text."""
    row_ends: Ints
    """`(R,)` places where rows end."""

    breaks: Ints
    """Numbers of the tokens that begin a piece."""

    @classmethod
    def of(cls, columns: Columns, table: TokenBytes) -> Tape:
        tokens, lengths = columns["tokens"].astype(np.int64), columns["lengths"].astype(np.int64)
        sizes = table.sizes(tokens)
        breaks = _breaks(columns["loss_mask"], sizes > 0, lengths)
        text = table.text(tokens)
        if table.prefixed:
            text, sizes = _without_prefixes(text, sizes, breaks)
        plain, places = sizes > 0, np.maximum(sizes, 1)
        laid = np.zeros(int(places.sum()), dtype=np.uint8)
        laid[np.repeat(plain, places)] = text
        ends = np.cumsum(places)
        row_ends = np.concatenate([[0], ends])[np.cumsum(lengths)]
        return cls(laid, ends, plain, row_ends, np.union1d(breaks, _beside(~plain)))

    def pieces(self, columns: Columns) -> Iterator[Piece]:
        """Text and special tokens of all rows in order. What follows bytes that are no character is left out, to the row's end."""
        tokens, lengths, mask = columns["tokens"], columns["lengths"].astype(np.int64), columns["loss_mask"]
        starts, row_starts = np.concatenate([[0], self.ends]), np.cumsum(lengths) - lengths
        breaks, rows = self.breaks.tolist(), np.searchsorted(np.cumsum(lengths), self.breaks, side="right").tolist()
        broken, before, run, was_learnt = NONE, NONE, NONE, False
        for first, stop, row in zip(breaks, [*breaks[1:], len(tokens)], rows, strict=False):
            run, was_learnt = (NONE, False) if row != before else (run, was_learnt)
            before, learnt = row, bool(mask[first])
            begins_run, run, was_learnt = learnt and not was_learnt, run + (learnt and not was_learnt), learnt
            if row == broken:
                continue
            piece = Piece(
                row, int(starts[first]), int(starts[stop]), None, int(tokens[first]), first == row_starts[row], run, begins_run, learnt
            )
            if self.plain[first]:
                piece, whole = self._text(piece)
                broken = row if not whole else NONE
                if not piece.text:
                    continue
            yield piece

    def _text(self, piece: Piece) -> tuple[Piece, bool]:
        """The piece as text, without the end of a character that began before its row, and whether it is read to its end."""
        skipped, text = _characters(self.bytes_[piece.start : piece.end].tobytes(), piece.first)
        start = piece.start + skipped
        end = start + len(text.encode())
        return replace(piece, start=start, end=end, text=text, token=NONE), end == piece.end


def _breaks(mask: NDArray[Any], plain: NDArray[np.bool_], lengths: Ints) -> Ints:
    """Numbers of tokens that begin a piece: of a row, special ones and those after them, and where what is learnt begins or ends. A row's
    first token is never learnt, so the second may only look like that."""
    stops = np.cumsum(lengths)
    firsts = (stops - lengths)[lengths > 0]
    changes = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    return np.union1d(np.union1d(firsts, np.setdiff1d(changes, firsts + 1)), _beside(~plain))


def _beside(special: NDArray[np.bool_]) -> Ints:
    """Numbers of the special tokens and of those after them."""
    places = np.flatnonzero(special)
    both = np.union1d(places, places + 1)
    return both[both < len(special)]


def _without_prefixes(text: NDArray[np.uint8], sizes: Ints, breaks: Ints) -> tuple[NDArray[np.uint8], Ints]:
    """Bytes and sizes without the space that encoding put before each piece."""
    before = np.cumsum(sizes) - sizes
    begin = breaks[sizes[breaks] > 0]
    spaced = begin[text[before[begin]] == ord(" ")]
    shorter = sizes.copy()
    shorter[spaced] -= 1
    return np.delete(text, before[spaced]), shorter


def _characters(given: bytes, begins: bool) -> tuple[int, str]:
    """How many bytes of a character that began earlier come first, of a row's first text, and the whole characters after them."""
    skipped = next((n for n, b in enumerate(given[: UNREAD + 1]) if b & 0xC0 != 0x80), UNREAD) if begins else 0
    rest = given[skipped:]
    try:
        return skipped, rest.decode()
    except UnicodeDecodeError as error:
        return skipped, rest[: error.start].decode()
