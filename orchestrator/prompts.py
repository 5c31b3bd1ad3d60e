"""Prompts that teachers write for, and the rows that nobody writes for because students are measured on them.

`prepare_prompts` reads the data once per fingerprint into a folder of the cache: `train` (a split of `Rows` whose rows are
prompts), `questions.jsonl` (what a judge and a reader want to know of each), `held_out.jsonl`, `left_out.jsonl` and `tokenizer`.
It holds all prompts in memory meanwhile.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from transformers import PreTrainedTokenizerBase

from orchestrator.encode import Encoder
from orchestrator.errors import Refusal
from orchestrator.files import Record
from orchestrator.fingerprint import data_fingerprint
from orchestrator.pieces import Bad, Encoded, Ids, fit
from orchestrator.questions import Question, question
from orchestrator.rows import RowWriter
from orchestrator.settings import DataConfig
from orchestrator.sources import PROMPT_KINDS, Source, open_sources

BATCH = 1024
VERSION = 2
"""Raised when the same data would make another folder."""
DUPLICATE, TOO_LONG, HELD_OUT = "the same prompt as before", "longer than data.max_length_tokens - max_new_tokens", "held out too"


@dataclass(frozen=True)
class Prompts:
    """Prepared prompts."""

    folder: str
    rows: int
    tokens: int
    longest_tokens: int
    references: int
    """Prompts that a judge has something to compare with."""
    held_out: int
    """Rows to measure on: prompts with the data's own completions."""
    held_out_by: str
    """Where these come from, in words."""
    left_out: Mapping[str, int]
    """Records that nobody writes for, by reason."""
    content: str
    """sha256 of the prompts' ids and their order."""

    @property
    def held_out_file(self) -> str:
        return str(Path(self.folder) / "held_out.jsonl")

    @property
    def tokenizer_folder(self) -> str:
        """The student's tokenizer, for whoever writes text and not ids."""
        return str(Path(self.folder) / "tokenizer")

    def questions(self) -> Iterator[dict[str, object]]:
        """`prompt` and `reference` of every prompt, in order."""
        with (Path(self.folder) / "questions.jsonl").open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file)


@dataclass(frozen=True)
class _Asked:
    """A record with its ids."""

    record: Record
    number: int
    question: Question
    ids: Ids


def prepare_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, room: int, cache: Path) -> Prompts:
    """The prompts of `data.train` of at most `room` tokens, each once. Held-out rows come from `data.held_out`, else they are
    records of `data.train` with a completion, chosen by `seed`; no prompt of them is written for. `Refusal` where there is none.
    """
    train = open_sources(config.train, config, config.split, "data.train", PROMPT_KINDS)
    held_out = None if config.held_out is None else open_sources(config.held_out, config, config.held_out_split, "data.held_out")
    files = [s.files for s in (train, held_out) if s is not None]
    name = hashlib.sha256(f"{VERSION} {data_fingerprint(files, config, seed, tokenizer)} {room}".encode()).hexdigest()[:16]
    folder = cache.absolute() / f"prompts-{name}"
    if not (folder / "prompts.json").exists():
        work = folder.with_name(f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        work.mkdir(parents=True)
        try:
            _make(work, train, held_out, config, tokenizer, seed, room)
            tokenizer.save_pretrained(str(work / "tokenizer"))
            _publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    made = Prompts(**json.loads((folder / "prompts.json").read_text(encoding="utf-8")))
    return replace(made, folder=str(folder))


def _publish(work: Path, folder: Path) -> None:
    """Moves the finished work into place; where another process was first, its result is as good."""
    try:
        work.rename(folder)
    except OSError:
        if not (folder / "prompts.json").exists():
            raise


def _make(
    work: Path, train: Source, held_out: Source | None, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, room: int
) -> None:
    left_out: Counter[str] = Counter()
    with (work / "left_out.jsonl").open("w", encoding="utf-8") as file:
        found = list(_asked(train, Encoder(tokenizer, train.where), config.max_rows, left_out, file))
        unique = _sift(found, {}, DUPLICATE, left_out, file)
        if held_out is None:
            rows, taken = _set_aside(unique, Encoder(tokenizer, train.where), config, seed)
            by = "records of the same source with its own completions, whose prompts nobody writes for"
        else:
            rows, taken = _given(held_out, Encoder(tokenizer, held_out.where), config, seed)
            by = f"from {config.held_out}, with its own completions"
        kept = _sift(unique, taken, HELD_OUT, Counter() if held_out is None else left_out, file if held_out is not None else None)
        fitting = [a for a in kept if len(a.ids) <= room]
        for each in (a for a in kept if len(a.ids) > room):
            _leave_out(each.record, TOO_LONG, left_out, file)
    if not fitting:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(5)) or "no records"
        do = "Give more prompts, or raise data.max_length_tokens or lower strategy.max_new_tokens."
        raise Refusal(f"data.train {config.train!r}", f"no prompt to write for ({reasons})", "at least one", do)
    _write(work, fitting, rows, by, left_out)


def _asked(source: Source, encoder: Encoder, most: int | None, left_out: Counter[str], file: IO[str]) -> Iterator[_Asked]:
    """Records that ask something; the others are left out."""
    numbered = enumerate(itertools.islice(source.records(), most))
    while batch := list(itertools.islice(numbered, BATCH)):
        questions = [Bad(r.problem) if r.problem is not None else question(r.columns) for _, r in batch]
        ids = iter(encoder.prompts([q.prompt for q in questions if isinstance(q, Question)]))
        for (number, record), asked in zip(batch, questions, strict=True):
            own = asked if isinstance(asked, Bad) else next(ids)
            if isinstance(own, Bad):
                _leave_out(record, own.reason, left_out, file)
            elif isinstance(asked, Question):
                yield _Asked(record, number, asked, own)


def _sift(found: Sequence[_Asked], taken: dict[bytes, int], reason: str, left_out: Counter[str], file: IO[str] | None) -> list[_Asked]:
    """Those whose ids are not `taken`, the first of each."""
    seen, kept = set(taken), []
    for each in found:
        if (ids := each.ids.tobytes()) not in seen:
            kept.append(each)
            seen.add(ids)
        elif file is not None:
            _leave_out(each.record, reason, left_out, file)
    return kept


def _leave_out(record: Record, reason: str, left_out: Counter[str], file: IO[str]) -> None:
    left_out[reason] += 1
    file.write(json.dumps({"source": record.source, "row": record.row, "reason": reason}) + "\n")


def _set_aside(found: Sequence[_Asked], encoder: Encoder, config: DataConfig, seed: int) -> tuple[list[Encoded], dict[bytes, int]]:
    """Rows of records that have a completion, and the ids of their prompts."""
    answered = [a for a in found if a.question.completion is not None]
    rows = _encoded([a.question.row for a in answered], encoder, config)
    usable = [i for i, row in enumerate(rows) if row is not None]
    if len(usable) < config.held_out_rows or len(found) <= config.held_out_rows:
        do = "Set data.held_out_rows lower, or name rows with completions in data.held_out."
        got = f"{len(usable)} prompts with a completion, of {len(found)}"
        raise Refusal("data.held_out_rows", got, f"{config.held_out_rows} to measure on, and others to write for", do)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(usable))[: config.held_out_rows])
    picked = [usable[i] for i in chosen.tolist()]
    return [row for i in picked if (row := rows[i]) is not None], {answered[i].ids.tobytes(): 1 for i in picked}


def _given(source: Source, encoder: Encoder, config: DataConfig, seed: int) -> tuple[list[Encoded], dict[bytes, int]]:
    """Rows of a source of their own, chosen by seed, and the ids of their prompts."""
    records = [r.columns for r in source.records() if r.problem is None]
    rows = _encoded(records, encoder, config)
    usable = [i for i, row in enumerate(rows) if row is not None]
    if not usable:
        raise Refusal("data.held_out", "no row to measure on", "at least one", "Check its columns and data.max_length_tokens.")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(usable))[: config.held_out_rows])
    picked = [usable[i] for i in chosen.tolist()]
    asked = [q.prompt for i in picked if isinstance(q := question(records[i]), Question)]
    prompts = [ids for ids in encoder.prompts(asked) if not isinstance(ids, Bad)]
    return [row for i in picked if (row := rows[i]) is not None], {ids.tobytes(): 1 for ids in prompts}


def _encoded(records: Sequence[Mapping[str, object]], encoder: Encoder, config: DataConfig) -> list[Encoded | None]:
    """One row for each record; None for one that is bad or too long."""
    found: list[Encoded | None] = []
    for start in range(0, len(records), BATCH):
        for row in encoder.encode(records[start : start + BATCH]):
            fits = None if isinstance(row, Bad) else fit(row, config.max_length_tokens, config.overlong)
            found.append(fits[0] if isinstance(fits, list) else None)
    return found


def _write(work: Path, asked: Sequence[_Asked], held_out: Sequence[Encoded], by: str, left_out: Counter[str]) -> None:
    digest = hashlib.sha256()
    with RowWriter(work / "train") as writer, (work / "questions.jsonl").open("w", encoding="utf-8") as file:
        for each in asked:
            size = np.asarray([len(each.ids)], dtype=np.int32)
            writer.write(each.ids, np.zeros(len(each.ids), np.uint8), size, np.asarray([each.number], dtype=np.int64))
            digest.update(size.tobytes() + each.ids.astype(np.int32).tobytes())
            file.write(json.dumps({"prompt": each.question.prompt, "reference": each.question.reference}) + "\n")
    with (work / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for row in held_out:
            file.write(json.dumps({"tokens": row.tokens.tolist(), "loss_mask": row.loss_mask.tolist()}) + "\n")
    made = Prompts(
        folder="",
        rows=writer.rows,
        tokens=writer.tokens,
        longest_tokens=writer.longest_tokens,
        references=sum(a.question.reference is not None for a in asked),
        held_out=len(held_out),
        held_out_by=by,
        left_out=dict(left_out.most_common()),
        content=digest.hexdigest(),
    )
    (work / "prompts.json").write_text(json.dumps(asdict(made), indent=1), encoding="utf-8")
