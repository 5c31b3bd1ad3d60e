"""Models and text to measure with: the quickstart's shapes with seeded random weights, saved like any model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jobs import quickstart

SEED = 0
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Material:
    """What both sides of a benchmark read."""

    data: Path
    """JSONL of rows."""
    student: Path
    teacher: Path
    parameters: Mapping[str, int]
    """Of `student` and `teacher`."""


def standard_library(folder: Path, smoke: bool) -> Material:
    """The quickstart's text and sizes; the first few modules and tiny models for a smoke run."""
    texts = [text for _, text in quickstart.sources()][: 8 if smoke else None]
    return make(folder, [{"text": text} for text in texts], texts, smoke)


def make(
    folder: Path, rows: Iterable[Mapping[str, str]], texts: Iterable[str], smoke: bool, vocabulary: int = quickstart.VOCABULARY
) -> Material:
    """Writes `rows` as they are, and a teacher and a student with a tokenizer trained on `texts`.

    Of a larger `vocabulary` only the quickstart's ids occur in texts; the networks compute all of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = quickstart.train_tokenizer(iter(texts))
    shapes = {"teacher": TINY if smoke else quickstart.TEACHER, "student": TINY if smoke else quickstart.STUDENT}
    parameters = {}
    for name, shape in shapes.items():
        quickstart.write_shape(folder / name, tokenizer, shape)
        config = AutoConfig.from_pretrained(folder / name)
        config.vocab_size = vocabulary
        config.save_pretrained(folder / name)
        parameters[name] = _save_weights(folder / name)
    return Material(data, folder / "student", folder / "teacher", parameters)


def _save_weights(folder: Path) -> int:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    return int(model.num_parameters())
