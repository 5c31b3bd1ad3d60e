"""The student's tokenizer, kept in a folder for endpoints that make text of ids or ids of text and name none."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cluster.config import EndpointConfig
from orchestrator.fingerprint import tokenizer_digest


def with_tokenizers(endpoints: Mapping[str, EndpointConfig], tokenizer: PreTrainedTokenizerBase, cache: Path) -> dict[str, EndpointConfig]:
    """The endpoints, those that need a tokenizer and name none with the student's, which is then saved in `cache` once."""
    folder = cache.absolute() / f"tokenizer-{tokenizer_digest(tokenizer).rpartition(':')[2][:16]}"
    equipped = {name: config.with_tokenizer(str(folder)) for name, config in endpoints.items()}
    if equipped != dict(endpoints) and not folder.exists():
        _save(tokenizer, folder)
    return equipped


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """In one step, so that a killed process leaves no half of it; another process may be as fast."""
    work = folder.with_name(f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    work.mkdir(parents=True)
    try:
        tokenizer.save_pretrained(str(work))
        work.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
