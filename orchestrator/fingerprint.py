"""Digests by which prepared data, tokenizers and chat templates are recognised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from orchestrator.settings import DataConfig

CODE = ("chat", "data", "encode", "files", "held_out", "marks", "pieces", "prompts", "questions", "rows", "sources", "staging")
"""Modules of this package that decide what prepared data looks like."""
SMALL_FILE_BYTES = 1 << 20
"""Files up to this size are known by their content, larger ones by size and time of change."""


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that turns text into ids: vocabulary, merges, normalisation, special tokens. Not of the chat
    template, and not of the truncation and padding that earlier calls have left switched on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: object = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        content = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _sha256(content, special)


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template; of null when there is none."""
    return _sha256(tokenizer.chat_template)


def data_fingerprint(
    sources_files: Iterable[Iterable[tuple[str, Path]]], config: DataConfig, seed: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """sha256 of everything that prepared data depends on: each source's files, settings, seed, tokenizer, template, and
    the code that does it."""
    code = [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in CODE]
    versions = [tokenizers.__version__, transformers.__version__]
    known = [[_known_by(name, path) for name, path in files_] for files_ in sources_files]
    return _sha256(known, config.model_dump(mode="json"), seed, tokenizer_digest(tokenizer), template_digest(tokenizer), code, versions)


def _known_by(name: str, path: Path) -> list[str | int]:
    status = path.stat()
    if status.st_size > SMALL_FILE_BYTES:
        return [name, status.st_size, status.st_mtime_ns]
    return [name, status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]


def _sha256(*content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
