"""A loss of many terms end to end: every kind of signal, scored in the stream and by a frozen player, with its control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run import distill
from tests.tiny import source_text, tiny_model, tiny_tokenizer

SIGNALS = {
    "far": {"endpoint": "teacher", "take": "hidden"},
    "whole": {"endpoint": "teacher", "take": "dense"},
    "drawn": {"endpoint": "teacher", "take": {"type": "sampled", "draws": 64}},
    "own": {"endpoint": "teacher", "take": "per-token"},
    "near": {"player": "teacher", "take": "dense"},
    "both": {"blend": {"far": 0.5, "near": 0.5}},
}
TERMS: list[dict[str, Any]] = [
    {"name": name, "objective": "forward-kl", "signal": name} for name in ("far", "whole", "drawn", "near", "both")
] + [
    {"objective": "hidden-states", "signal": "teacher", "weight": 0.1},
    {"objective": {"type": "cross-entropy", "smoothing": 0.1}, "weight": 0.1},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terms")
    tokenizer = tiny_tokenizer(folder / "student")
    tokenizer.save_pretrained(folder / "teacher")
    tiny_model(folder / "student", vocab_size=len(tokenizer))
    tiny_model(folder / "teacher", vocab_size=len(tokenizer), width=48, seed=1)
    lines = [line for line in source_text().splitlines() if line.strip()][:300]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


@pytest.mark.slow
def test_every_way_to_ask_a_teacher_gives_the_same_forward_kl(home: Path, ray_session: str) -> None:
    recipe = {
        "name": "terms",
        "student": str(home / "student"),
        "strategy": {"type": "terms", "signals": {k: v for k, v in SIGNALS.items() if k != "own"}, "terms": TERMS},
        "endpoints": {"teacher": {"model": str(home / "teacher")}},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 16, "max_length_tokens": 48},
        "train": {"steps": 4, "batch_rows": 8, "lr": 3e-3, "layout": "single", "micro_batch_tokens": 128},
        "baseline": True,
    }
    result = distill(recipe, cluster={"storage": str(home / "runs"), "address": "auto"})
    rows = [json.loads(line)["values"] for line in (home / "runs" / "terms" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    assert len(steps) == 4
    for values in steps:
        exact = values["loss/far"]
        assert all(abs(values[f"loss/{name}"] / exact - 1) < 1e-4 for name in ("whole", "near", "both"))
        assert abs(values["loss/drawn"] / exact - 1) < 0.2
    teacher, student, control = result.comparison
    assert teacher.cross_entropy and student.forward_kl and control.forward_kl and control.top1_agreement is not None
    assert student.forward_kl < control.forward_kl
