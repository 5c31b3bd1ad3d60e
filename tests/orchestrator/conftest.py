"""A good recipe with two small models, made once, for the tests of the door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.orchestrator.bench import ROWS, TEXT, Bench
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def bench_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, width, words, seed in (("student", 32, 512, 0), ("teacher", 48, 512, 1), ("padded", 32, 640, 2)):
        tiny_model(folder / name, vocab_size=words, width=width, seed=seed)
        tiny_tokenizer(folder / name)
    tiny_model(folder / "foreign", vocab_size=400)
    tiny_tokenizer(folder / "foreign", vocab_size=400)
    lines = [json.dumps({"text": TEXT.format(i) * 2}) for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def bench(bench_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = {
        "student": {"model": str(bench_models / "student")},
        "strategy": {"type": "logits", "top_k": 8},
        "data": {"train": str(bench_models / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 64},
        "train": {"steps": 4, "batch_rows": 8, "layout": {"type": "single"}},
        "endpoints": {"teacher": {"model": str(bench_models / "teacher")}},
    }
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # what is warned of shall not depend on where the tests run
    return Bench(bench_models, recipe, {"storage": str(tmp_path / "runs"), "resources": {"worker": {"cpus": 0.1}}}, monkeypatch)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks are slower on several threads, and other processes of a test want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
