"""Rows read with another tokenizer: the student's ids to bytes, bytes to the teacher's ids, and where tokens end in both.

A row is text between special tokens. Text is encoded anew, piece by piece: a prompt apart from its completion, as the row itself was.
Of conversations that holds for what is learnt, and what stands between comes from the teacher's own template. A special token of the
student becomes the teacher's of the same role or the same name, or nothing. Bytes that are no character, such as half of one where a
text was cut, are not read: of the rest of such a row the teacher says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from orchestrator.authored import stop_tokens
from orchestrator.checks.networks import adds_before
from orchestrator.tape import Piece, Tape
from orchestrator.token_bytes import TokenBytes, special_ids, token_bytes
from orchestrator.turns import Turns
from strategies.core import Columns
from strategies.stages.align import NONE, Ints, Reading


@dataclass(frozen=True)
class ForeignReader:
    """Reads the student's rows with a teacher's tokenizer (`strategies.stages.align.Reader`)."""

    student: TokenBytes
    teacher: TokenBytes
    tokenizer: PreTrainedTokenizerBase
    """The teacher's."""
    backend: Tokenizer | None
    """What a fast one works with, in a copy of its own."""
    unknown: int
    """The teacher's id for what it has no tokens for; `NONE` where it has one for every byte."""
    roles: Mapping[int, int]
    """The teacher's special ids by the student's."""
    student_opening: tuple[int, ...]
    """What the student's tokenizer puts before a text."""
    opening: tuple[int, ...]
    """What the teacher's puts there."""
    longest_tokens: int
    """Positions of the teacher: nothing is read beyond."""
    turns: Turns | None = None
    """Of conversations, what the teacher's template puts around what is learnt."""
    expansion: float = 1.0
    """Tokens of the teacher for each of the student's, at most, as far as was measured."""

    def read(self, columns: Columns) -> Reading:
        """See `strategies.stages.align.Reader`."""
        tape = Tape.of(columns, self.student)
        between = self.turns.between(columns) if self.turns else None
        pieces = [p for p in tape.pieces(columns) if between is None or (p.learnt and p.run < len(between[p.row]))]
        encoded = iter(self._encoded([p.text for p in pieces if p.text is not None]))
        rows = _Rows(self.opening if between is None else (), self.longest_tokens, len(columns["lengths"]), self.unknown)
        for piece in pieces:
            if between is not None and piece.begins_run:
                rows.between(piece, between[piece.row][piece.run])
            if piece.text is None:
                rows.special(piece, self._counterpart(piece))
            else:
                ids, ends = next(encoded)
                rows.text(piece, ids, ends)
        return rows.reading(tape)

    def _counterpart(self, piece: Piece) -> int:
        """The teacher's id for a special token of the student; `NONE` for nothing."""
        if piece.first and piece.token in self.student_opening and self.opening:
            return NONE  # its own opening stands there already
        return self.roles.get(piece.token, NONE)

    def _encoded(self, texts: Sequence[str]) -> list[tuple[Ints, Ints]]:
        """Ids of each text, and after how many of its bytes each of them ends: as the bytes of the tokens add up, or, of a text that the
        tokenizer changed before it cut it, with the characters that it tells."""
        found = []
        for text, ids in zip(texts, self._ids(texts), strict=True):
            ends, whole = np.cumsum(self.teacher.sizes(ids)), len(text.encode())
            if self.teacher.prefixed and len(ids) and ends[-1] == whole + 1:
                ends = ends - 1
            found.append((ids, ends if len(ids) and ends[-1] == whole else self._told(text, ids)))
        return found

    def _ids(self, texts: Sequence[str]) -> list[Ints]:
        """Ids of each text; what looks like a special token in a text is text."""
        if self.backend is None:
            return [np.asarray(self.tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"]) for t in texts]
        self.backend.encode_special_tokens = True  # does not survive pickling
        return [np.asarray(e.ids, dtype=np.int64) for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _told(self, text: str, ids: Ints) -> Ints:
        """Ends by the characters that the tokenizer gives each of `ids`; none of them is known where it tells nothing."""
        unknown = np.zeros(len(ids), dtype=np.int64)
        if self.backend is None:
            return unknown
        offsets = self.backend.encode(text, add_special_tokens=False).offsets
        before = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])])
        ends = np.maximum.accumulate(before[[end for _, end in offsets]]) if offsets else unknown
        return ends if len(ends) == len(ids) else unknown


def foreign_reader(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str, longest_tokens: int) -> ForeignReader:
    """The reader for the endpoint `name`. `Refusal` for tokenizers whose tokens are not bytes of text."""
    backend: Any = getattr(teacher, "backend_tokenizer", None)
    return ForeignReader(
        student=token_bytes(student, "tokenizer of the student"),
        teacher=token_bytes(teacher, f"tokenizer of endpoint {name!r}"),
        tokenizer=teacher,
        backend=None if backend is None else _plain(backend),
        unknown=NONE if teacher.unk_token_id is None else int(teacher.unk_token_id),
        roles=roles(student, teacher),
        student_opening=tuple(adds_before(student)),
        opening=tuple(adds_before(teacher)),
        longest_tokens=longest_tokens,
    )


def _plain(backend: Tokenizer) -> Tokenizer:
    """The same without truncation and padding, which earlier calls may have left switched on."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def roles(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[int, int]:
    """The teacher's special ids by the student's: those of one name, EOS for EOS, and what ends a turn for what ends a turn."""
    theirs = {str(teacher.convert_ids_to_tokens(i)): i for i in special_ids(teacher)}
    found = {i: theirs[name] for i in special_ids(student) if (name := str(student.convert_ids_to_tokens(i))) in theirs}
    if student.eos_token_id is not None and teacher.eos_token_id is not None:
        found[int(student.eos_token_id)] = int(teacher.eos_token_id)
    if student.chat_template is not None and teacher.chat_template is not None:
        found[stop_tokens(student)[-1]] = stop_tokens(teacher)[-1]
    return found


def shared_ids(reader: ForeignReader, end: int | None = None) -> tuple[int, ...]:
    """By id of the teacher, the student's id of the very same bytes, or for a special token that of the same role; `NONE` without one, and
    where encoding takes another of the teacher's for these bytes, so that no two share one of the student's.

    Where several of the student's have one role, such as the ends of a text and of a turn, it is `end`, which ends what is learnt.
    """
    special = {theirs: ours for ours, theirs in reader.roles.items()}
    if end is not None and end in reader.roles:
        special[reader.roles[end]] = end
    ours, theirs = reader.student.ids_by_bytes(), reader.teacher.ids_by_bytes()
    same = {i: ours[text] for text, i in theirs.items() if text in ours} | special
    return tuple(same.get(i, NONE) for i in range(len(reader.teacher.starts) - 1))


class _Rows:
    """The teacher's rows as they grow."""

    def __init__(self, opening: Sequence[int], longest_tokens: int, rows: int, unknown: int):
        self._unknown, self._opening, self._longest = unknown, np.asarray(opening, dtype=np.int64), longest_tokens
        self._ids: list[list[Ints]] = [[self._opening] for _ in range(rows)]
        self._ends: list[list[Ints]] = [[np.full(len(self._opening), NONE, dtype=np.int64)] for _ in range(rows)]
        self._cuts: list[int] = []

    def between(self, piece: Piece, ids: Ints) -> None:
        """Ids of the teacher's own before a piece, which stand for nothing of the row."""
        self._append(piece.row, ids, np.full(len(ids), NONE, dtype=np.int64))

    def special(self, piece: Piece, token: int) -> None:
        """The teacher's `token` for a special one; nothing for `NONE`."""
        self._cuts += [piece.start, piece.end]
        if token != NONE:
            self._append(piece.row, np.asarray([token]), np.asarray([piece.end]))

    def text(self, piece: Piece, ids: Ints, ends: Ints) -> None:
        """Ids for a text, of which each ends after so many bytes of it. Those that end at 0, such as a space that was put before the text,
        and those of unknown characters stand for nothing."""
        self._cuts += [piece.start, piece.end]
        unread = np.flatnonzero(ids == self._unknown)
        if len(unread):
            edges = np.concatenate([ends[unread], np.where(unread > 0, ends[unread - 1], 0)])
            self._cuts += (edges + piece.start).tolist()
        self._append(piece.row, ids, np.where((ids != self._unknown) & (ends > 0), ends + piece.start, NONE))

    def _append(self, row: int, ids: Ints, ends: Ints) -> None:
        self._ids[row].append(ids)
        self._ends[row].append(ends)

    def reading(self, tape: Tape) -> Reading:
        """All rows, each cut to what the teacher has positions for."""
        ids, ends = ([np.concatenate(r)[: self._longest] for r in side] for side in (self._ids, self._ends))
        none = np.zeros(0, dtype=np.int64)
        return Reading(
            tokens=np.concatenate([none, *ids]).astype(np.int32),
            lengths=np.asarray([len(r) for r in ids], dtype=np.int32),
            ours=tape.ends,
            theirs=np.concatenate([none, *ends]),
            cuts=np.unique(np.concatenate([np.asarray(self._cuts, dtype=np.int64), tape.row_ends])),
        )
