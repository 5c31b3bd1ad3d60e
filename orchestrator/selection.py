"""From written texts to rows to learn from: judged, freed of duplicates, capped. What is not kept is listed with its reason."""

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

from cluster.stores.files import StoreFiles
from cluster.stores.parts import StoreDamaged
from cluster.stores.texts import WrittenText, read_texts
from cluster.verifiers.answers import verdict
from orchestrator.errors import Refusal
from orchestrator.prompts import Prompts
from orchestrator.rows import Rows
from strategies.stages.write import Authored, Judge

VERSION = 1
"""Raised when the same texts would give other rows."""
UNFINISHED, DUPLICATE, BEYOND, EMPTY = "not finished", "the same text as before", "more than per_prompt", "empty"


@dataclass(frozen=True)
class Source:
    """A finished store and what is wanted of it."""

    authored: Authored
    files: StoreFiles
    name: str
    """Of the endpoint."""


@dataclass(frozen=True)
class Selected:
    """The rows chosen from text stores."""

    folder: str
    prompts: int
    """Prompts with at least one row."""
    written: int
    kept: int
    tokens: int
    """Learnt tokens of the rows."""
    right: int | None
    """Texts that the judge found right; None without a judge."""
    rejected: Mapping[str, int]
    """Texts that are not learnt from, by reason."""

    @property
    def rows_file(self) -> Path:
        """Rows that any recipe can read: `tokens` and `loss_mask`, beside `prompt`, `completion`, `author`, `row`, `sample`,
        `correct`, `finished` and `logprob`, which is null where the engine was not told it."""
        return Path(self.folder) / "rows.jsonl"

    @property
    def rejected_file(self) -> Path:
        """The same without ids, and with `reason`."""
        return Path(self.folder) / "rejected.jsonl"


def select(sources: Sequence[Source], prompts: Prompts, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Selected:
    """The rows of finished stores, made in `cache` unless they are there. `Refusal` when nothing is left or a part is damaged."""
    what = [(s.name, s.files.spec.key.digest, _settings(s.authored)) for s in sources]
    name = hashlib.sha256(json.dumps([VERSION, Path(prompts.folder).name, what]).encode()).hexdigest()[:16]
    folder = cache.absolute() / f"text-{name}"
    if not (folder / "selected.json").exists():
        work = folder.with_name(f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        work.mkdir(parents=True)
        try:
            _make(work, sources, prompts, tokenizer)
            work.rename(folder)
        except OSError:
            if not (folder / "selected.json").exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    selected = replace(Selected(**json.loads((folder / "selected.json").read_text(encoding="utf-8"))), folder=str(folder))
    if not selected.kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in selected.rejected.items())
        do = f"Look at them in {selected.rejected_file}; then change the prompts, the judge, or the teacher."
        raise Refusal("strategy", f"no text to learn from among {selected.written} ({reasons})", "at least one", do)
    return selected


def _settings(authored: Authored) -> dict[str, object]:
    return {"judge": authored.judge.model_dump(mode="json"), "unfinished": authored.unfinished, "per_prompt": authored.per_prompt}


def _make(work: Path, sources: Sequence[Source], prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    tally: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    with (work / "rows.jsonl").open("w", encoding="utf-8") as rows, (work / "rejected.jsonl").open("w", encoding="utf-8") as out:
        for source in sources:
            _choose(source, prompts, tokenizer, _Files(rows, out), tally, rejected)
    judged = any(s.authored.judge.type != "none" for s in sources)
    made = Selected(
        folder="",
        prompts=tally["prompts"],
        written=tally["written"],
        kept=tally["kept"],
        tokens=tally["tokens"],
        right=tally["right"] if judged else None,
        rejected=dict(rejected.most_common()),
    )
    (work / "selected.json").write_text(json.dumps(asdict(made), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class _Files:
    rows: IO[str]
    rejected: IO[str]


def _choose(
    source: Source, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, files: _Files, tally: Counter[str], rejected: Counter[str]
) -> None:
    """Writes the rows of one store, prompt by prompt."""
    ids, questions = Rows(prompts.folder, "train"), prompts.questions()
    for row, texts in itertools.groupby(_texts(source.files), key=lambda t: t.row_id):
        asked, prompt = next(questions), ids.read(np.asarray([row]))["tokens"].tolist()
        reference = asked["reference"]
        kept = 0
        for text, words, correct, reason in _judged(list(texts), source.authored, tokenizer, None if reference is None else str(reference)):
            about = _about(source.name, text, asked["prompt"], words, correct)
            tally["written"] += 1
            tally["right"] += correct is True
            if reason:
                rejected[reason] += 1
                files.rejected.write(json.dumps({"reason": reason, **about}) + "\n")
                continue
            kept += 1
            tally["tokens"] += len(text.tokens)
            own = {"tokens": prompt + text.tokens.tolist(), "loss_mask": [0] * len(prompt) + [1] * len(text.tokens)}
            files.rows.write(json.dumps({**about, **own}) + "\n")
        tally["kept"] += kept
        tally["prompts"] += kept > 0


def _about(author: str, text: WrittenText, prompt: object, words: str, correct: bool | None) -> dict[str, object]:
    return {
        "prompt": prompt,
        "completion": words,
        "author": author,
        "row": text.row_id,
        "sample": text.sample,
        "correct": correct,
        "finished": text.finished,
        "logprob": None if np.isnan(known := float(text.logprobs.sum(dtype=np.float64))) else round(known, 4),
    }


def _texts(files: StoreFiles) -> Iterator[WrittenText]:
    try:
        for info in files.parts:
            yield from read_texts(f"{files.folder.root}/{info.file}", files.content(info))
    except StoreDamaged as error:
        do = f"Remove the folder {files.folder.root}; the text is written again."
        raise Refusal(f"text store {files.folder.root}", f"damage ({error})", "every part as it was written", do) from error


def _judged(
    texts: Sequence[WrittenText], authored: Authored, tokenizer: PreTrainedTokenizerBase, reference: str | None
) -> Iterator[tuple[WrittenText, str, bool | None, str]]:
    """Each text of a prompt with its words, whether it is right, and why it is not kept (empty for a kept one)."""
    seen: set[bytes] = set()
    kept = 0
    for text in texts:
        words = str(tokenizer.decode(text.tokens.tolist(), skip_special_tokens=True))
        correct, reason = _verdict(authored.judge, words, reference)
        if not reason:
            reason = _unwanted(text, words, authored, seen, kept)
        kept += not reason
        yield text, words, correct, reason


def _verdict(judge: Judge, words: str, reference: str | None) -> tuple[bool | None, str]:
    if judge.type == "none":
        return None, ""
    if reference is None:
        return None, "no reference"
    return verdict(judge.type, words, reference, judge.pattern)


def _unwanted(text: WrittenText, words: str, authored: Authored, seen: set[bytes], kept: int) -> str:
    """Why a text that is not wrong is not learnt from; remembers it."""
    if not text.finished and authored.unfinished == "drop":
        return UNFINISHED
    if not words.strip():
        return EMPTY
    if text.tokens.tobytes() in seen:
        return DUPLICATE
    seen.add(text.tokens.tobytes())
    return BEYOND if authored.per_prompt is not None and kept >= authored.per_prompt else ""
