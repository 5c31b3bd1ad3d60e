"""Rows read with another tokenizer: identical bytes in every aligned span, of real texts and of what cuts and special tokens do."""

from __future__ import annotations

import pickle
import re
import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orchestrator.errors import Refusal
from orchestrator.foreign import foreign_reader, roles, shared_ids
from orchestrator.token_bytes import TokenBytes, token_bytes
from strategies.core import Columns
from strategies.stages.align import NONE, Reading, Spans, spans, taught_spans
from strategies.stages.rollout import LONGEST_ROW
from tests.tokenizers import KINDS, bundle, byte_level_bpe, kind, sentencepiece, shown_bytes

TEXTS, CHARACTERS, ROW = 1000, 800, 96
PAIRS = [
    ("bpe", "large-bpe"),
    ("large-bpe", "bpe"),
    ("bytes", "large-bpe"),
    ("byt5", "bpe"),
    ("bpe", "sentencepiece"),
    ("sentencepiece", "bpe"),
]
UNICODE = "naïve café — 中文字 \U0001f600\U0001f469‍\U0001f4bb ﬁ Å e\u0301 \t\r\n  x"


@cache
def real_texts() -> list[str]:
    """Pieces of the standard library's files, those beyond ASCII first: tests of codecs, names and translations are among them."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in files]
    begins = [max(0, found.start() - 200) if (found := re.search("[^\x00-\x7f]", t)) else 0 for t in texts]
    pieces = [t[b : b + CHARACTERS] for t, b in zip(texts, begins, strict=True) if t.strip()]
    return sorted(pieces, key=lambda t: t.isascii())[:TEXTS]


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def covered(columns: Columns, reading: Reading, found: Spans, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> float:
    """Asserts that each span has the same bytes on both sides, in the same row; the share of tokens in spans. The space that some
    tokenizers put before a text is not of it."""
    sides = []
    for tokens, numbers, lengths, tokenizer in (
        (columns["tokens"], found.ours, columns["lengths"], ours),
        (reading.tokens, found.theirs, reading.lengths, theirs),
    ):
        said, rows, inside = shown_bytes(tokenizer), np.repeat(np.arange(len(lengths)), lengths), numbers != NONE
        begins = np.diff(rows[inside], prepend=-1) > 0
        texts = [said[i].removeprefix(b" ") if b else said[i] for i, b in zip(tokens[inside].tolist(), begins.tolist(), strict=True)]
        sizes = [len(t) for t in texts]
        sides.append((b"".join(texts), np.repeat(numbers[inside], sizes), np.repeat(rows[inside], sizes)))
    assert sides[0][0] == sides[1][0]
    assert all(np.array_equal(a, b) for a, b in zip(*(side[1:] for side in sides), strict=True))
    return float((found.ours != NONE).mean())


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_aligned_span_of_a_thousand_real_texts_covers_the_same_bytes(ours: str, theirs: str) -> None:
    student, teacher, texts = kind(ours), kind(theirs), real_texts()
    assert len(texts) == TEXTS and sum(not t.isascii() for t in texts) > 100
    ids = [ids_of(student, t) for t in texts]
    columns = bundle([r[i : i + ROW] for r in ids for i in range(0, len(r), ROW)])  # as documents are cut, also inside a character
    reading = foreign_reader(student, teacher, "teacher", LONGEST_ROW).read(columns)
    assert covered(columns, reading, spans(reading.ours, reading.theirs, reading.cuts), student, teacher) > 0.97


@pytest.mark.parametrize("name", KINDS)
def test_bytes_of_tokens_add_up_to_the_text(name: str) -> None:
    tokenizer = kind(name)
    table, text = token_bytes(tokenizer, "here"), UNICODE
    back = table.text(np.asarray(ids_of(tokenizer, text))).tobytes()
    assert back == (b" " if table.prefixed else b"") + text.encode()
    assert table.prefixed == (name == "sentencepiece")
    assert table.sizes(np.asarray([tokenizer.eos_token_id, 10**6])).tolist() == [0, 0]
    by_bytes = table.ids_by_bytes()
    assert all(table.text(np.asarray([i])).tobytes() == text for text, i in by_bytes.items()) and len(by_bytes) > 250


def read(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, columns: Columns, longest: int = LONGEST_ROW) -> Reading:
    return foreign_reader(ours, theirs, "teacher", longest).read(columns)


def texts_of(tokenizer: PreTrainedTokenizerBase, reading: Reading) -> list[str]:
    """The teacher's rows as text, special tokens by name."""
    rows = np.split(reading.tokens, np.cumsum(reading.lengths)[:-1])
    return [str(tokenizer.decode(r.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)) for r in rows]


def test_an_end_is_an_end_and_aligns_by_its_role_alone() -> None:
    student, teacher = kind("bpe"), kind("sentencepiece")
    assert roles(student, teacher)[student.eos_token_id] == teacher.eos_token_id
    columns = bundle([[*ids_of(student, "def f(x):"), student.eos_token_id]])
    reading = read(student, teacher, columns)
    assert reading.tokens[[0, -1]].tolist() == [teacher.bos_token_id, teacher.eos_token_id]
    found = taught_spans(reading, columns["loss_mask"])
    assert (found.ours[-1], found.theirs[-1]) == (found.count - 1, found.count - 1)
    assert np.count_nonzero(found.ours == found.count - 1) == 1, "the end is a span of its own"
    assert reading.theirs[0] == NONE, "BOS is read before the row, and stands for nothing of it"


def test_special_tokens_without_a_counterpart_are_not_read_and_part_the_text() -> None:
    student, teacher = kind("bpe"), kind("bytes")
    mark = student.convert_tokens_to_ids("<|im_start|>")
    columns = bundle([[*ids_of(student, "ab"), mark, *ids_of(student, "cd"), student.eos_token_id]])
    reading = read(student, teacher, columns)
    assert texts_of(teacher, reading) == ["abcd</s>"]
    found = spans(reading.ours, reading.theirs, reading.cuts)
    assert found.ours[columns["tokens"] == mark].tolist() == [NONE]
    assert (found.ours[columns["tokens"] != mark] != NONE).all()


def test_what_looks_like_a_special_token_in_a_text_is_text_to_the_teacher() -> None:
    student, teacher = kind("bytes"), kind("bpe")
    columns = bundle([ids_of(student, "x <|endoftext|> y")])
    reading = read(student, teacher, columns)
    assert not set(reading.tokens.tolist()) & set(teacher.all_special_ids)
    assert covered(columns, reading, spans(reading.ours, reading.theirs, reading.cuts), student, teacher) == 1.0


def test_a_prompt_is_encoded_apart_from_its_completion() -> None:
    student, teacher = kind("bytes"), kind("large-bpe")
    prompt, completion = ids_of(student, "impo"), ids_of(student, "rt argparse")
    columns = bundle([prompt + completion], [[0] * len(prompt) + [1] * len(completion)])
    reading = read(student, teacher, columns)
    assert reading.tokens.tolist() == ids_of(teacher, "impo") + ids_of(teacher, "rt argparse")
    assert (taught_spans(reading, columns["loss_mask"]).ours[len(prompt) :] != NONE).all()
    whole = bundle([prompt + completion])  # a row of text begins with a token that nobody predicts
    assert read(student, teacher, whole).tokens.tolist() == ids_of(teacher, "import argparse")


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
def test_half_a_character_is_not_read_and_the_rest_of_its_row_aligns_with_nothing(name: str) -> None:
    student, teacher = kind("bytes"), kind(name)
    smile, texts = ids_of(student, "\U0001f600"), [ids_of(student, t) for t in ("ab", "cd", "e", "fg", "hi")]
    rows = [[*smile[2:], *texts[0]], [*texts[1], *smile[:2]], [*texts[2], smile[1], *texts[3]], texts[4]]
    rows.append([*texts[2], smile[1], student.eos_token_id])
    reading = read(student, teacher, bundle(rows))
    opening = "<s>" if name == "sentencepiece" else ""
    assert [t.removeprefix(opening).strip() for t in texts_of(teacher, reading)] == ["ab", "cd", "e", "hi", "e"]
    found = spans(reading.ours, reading.theirs, reading.cuts)
    aligned = [[False] * 2 + [True] * 2, [True] * 2 + [False] * 2, [True] + [False] * 3, [True] * 2, [True] + [False] * 2]
    assert (found.ours != NONE).tolist() == [a for row in aligned for a in row]


def test_characters_that_a_teacher_has_no_token_for_align_with_nothing() -> None:
    student, teacher = kind("bytes"), sentencepiece(fallback=False)
    columns = bundle([ids_of(student, "def 中文 import")])
    reading = read(student, teacher, columns)
    assert teacher.unk_token_id in reading.tokens.tolist()
    found = spans(reading.ours, reading.theirs, reading.cuts)
    aligned = bytes(b for b, n in zip("def 中文 import".encode(), found.ours.tolist(), strict=True) if n != NONE)
    assert b"def" in aligned and b"import" in aligned and not any(b >= 128 for b in aligned)
    assert not (found.theirs[reading.tokens == teacher.unk_token_id] != NONE).any()


def test_a_teacher_that_changes_the_text_is_aligned_by_the_characters_that_it_tells() -> None:
    student, teacher, text = kind("bytes"), sentencepiece(changed=True), "if ｘ in ａｂ: pass"
    columns = bundle([ids_of(student, text)])
    reading = read(student, teacher, columns)
    found = spans(reading.ours, reading.theirs, reading.cuts)
    assert (found.ours != NONE).all()
    last = [text.encode()[: int(e)].decode() for e in np.unique(reading.theirs[reading.theirs != NONE])]
    assert last[-1] == text and "if ｘ" in last


def test_a_row_is_read_as_far_as_the_teacher_has_positions() -> None:
    student, teacher = kind("bpe"), kind("bytes")
    columns = bundle([ids_of(student, "def function(argument):"), ids_of(student, "x")])
    reading = read(student, teacher, columns, longest=8)
    assert texts_of(teacher, reading) == ["def func", "x"]
    found = spans(reading.ours, reading.theirs, reading.cuts)
    first = found.ours[: columns["lengths"][0]] != NONE
    assert first[0] and not first[-1] and found.ours[-1] != NONE


def test_an_empty_bundle_is_read_too_and_a_reader_travels() -> None:
    reader = foreign_reader(kind("sentencepiece"), kind("bpe"), "teacher", LONGEST_ROW)
    empty = reader.read(bundle([]))
    assert not len(empty.tokens) and not len(empty.ours) and not len(empty.lengths)
    columns = bundle([ids_of(kind("sentencepiece"), UNICODE)])
    there, here = pickle.loads(pickle.dumps(reader)).read(columns), reader.read(columns)
    assert there.tokens.tolist() == here.tokens.tolist() and there.theirs.tolist() == here.theirs.tolist()


def test_tokens_are_shared_where_their_bytes_are_the_same() -> None:
    student, teacher = kind("bpe"), kind("sentencepiece")
    shared = shared_ids(foreign_reader(student, teacher, "teacher", LONGEST_ROW))
    said, theirs = shown_bytes(student), shown_bytes(teacher)
    assert len(shared) == len(theirs) and shared[teacher.eos_token_id] == student.eos_token_id and shared[teacher.bos_token_id] == NONE
    pairs = [(said[i], theirs[t]) for t, i in enumerate(shared) if i != NONE and t != teacher.eos_token_id]
    assert all(a == b for a, b in pairs) and len(pairs) > 300
    assert len({i for i in shared if i != NONE}) == sum(i != NONE for i in shared), "no two share one of the student's"
    missed = {b for t, b in enumerate(theirs) if shared[t] == NONE and b} - {theirs[t] for t, i in enumerate(shared) if i != NONE}
    assert not missed & {b for b in said if b}


def test_bytes_that_a_piece_has_are_never_those_of_the_fallback() -> None:
    """Llama 2's vocabulary has its 256 bytes before all pieces; encoding writes the piece."""
    llama = TokenBytes(np.frombuffer(b"ABAC", dtype=np.uint8), np.arange(5), False, frozenset({0, 1}))
    assert llama.ids_by_bytes() == {b"A": 2, b"B": 1, b"C": 3}
    other = TokenBytes(np.frombuffer(b"CBA", dtype=np.uint8), np.arange(4), False)
    reader = replace(foreign_reader(kind("bpe"), kind("bpe"), "teacher", LONGEST_ROW), roles={})
    assert shared_ids(replace(reader, student=llama, teacher=other)) == (3, 1, 2)
    assert shared_ids(replace(reader, student=other, teacher=llama)) == (NONE, 1, 2, 0), "one of the student's is no two of the teacher's"


def test_the_teachers_end_is_that_of_what_the_student_learns() -> None:
    student, teacher = (
        kind("bpe"),
        byte_level_bpe(400, template="{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", turn="<|x|>"),
    )
    reader = foreign_reader(student, teacher, "teacher", LONGEST_ROW)
    turn = student.convert_tokens_to_ids("<|im_end|>")
    assert reader.roles[student.eos_token_id] == reader.roles[turn] == teacher.eos_token_id
    assert [shared_ids(reader, end)[teacher.eos_token_id] for end in (student.eos_token_id, turn)] == [student.eos_token_id, turn]


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, "<end>"))
    with pytest.raises(Refusal, match="byte-level, SentencePiece or byte tokenizer"):
        foreign_reader(kind("bpe"), PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"), "teacher", LONGEST_ROW)
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(Refusal, match="a decoder of WordPiece|tokens that are not bytes"):
        foreign_reader(PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="[UNK]"), kind("bpe"), "teacher", LONGEST_ROW)
