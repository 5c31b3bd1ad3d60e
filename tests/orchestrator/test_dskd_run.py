"""Two spaces and two tokenizers in a whole run on two workers: states travel, filters are kept and not exported, a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from orchestrator.run import distill
from tests.tiny import source_text, tiny_model, tiny_tokenizer

STEPS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dskd")
    for name, vocabulary, width, seed in (("student", 512, 32, 0), ("far", 400, 48, 2)):
        tokenizer = tiny_tokenizer(folder / name, vocabulary)
        tiny_model(folder / name, vocab_size=len(tokenizer), width=width, seed=seed)
    lines = [line for line in source_text().splitlines() if len(line) > 20][:160]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def run(home: Path, name: str, strategy: dict[str, Any], train: dict[str, Any]) -> list[dict[str, float]]:
    """Metrics of every step and of the last evaluation."""
    recipe = {
        "name": name,
        "student": str(home / "student"),
        "strategy": {"teacher": "far", **strategy},
        "endpoints": {"far": {"model": str(home / "far")}},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 3e-3, "micro_batch_tokens": 128, **train},
    }
    distill(recipe, cluster={"storage": str(home / "runs"), "address": "auto"})
    lines = (home / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["values"] for line in lines]


@pytest.mark.slow
def test_a_run_on_two_workers_is_the_run_on_one(home: Path, ray_session: str) -> None:
    strategy = {"type": "dskd", "filters_lr": 1e-2}
    one = run(home, "one", strategy, {"layout": "single"})
    two = run(home, "two", strategy, {"layout": "fsdp2", "workers": 2})
    for name in ("loss", "loss/task", "loss/student-space", "loss/teacher-space", "loss/ce", "grad_norm"):
        pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True) if name in a]
        assert len(pairs) == STEPS
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=2e-4), name
    assert one[-1]["eval/cross_entropy"] == pytest.approx(two[-1]["eval/cross_entropy"], rel=1e-4)
    weights = load_file(home / "runs" / "one" / "student" / "model.safetensors")
    assert not any("filters" in name for name in weights)


@pytest.mark.slow
def test_spans_and_units_behind_them_are_compared_in_a_run(home: Path, ray_session: str) -> None:
    found = run(home, "units", {"type": "alm", "debias": True, "student_share": 0.5, "max_new_tokens": 8}, {"layout": "single"})
    plain = run(home, "plain", {"type": "alm", "student_share": 0.5, "max_new_tokens": 8}, {"layout": "single"})
    assert found[0]["loss/kd"] > 0 and found[0]["loss/kd"] != pytest.approx(plain[0]["loss/kd"], rel=1e-3)
    assert found[-1]["eval/teacher_cross_entropy/far"] == pytest.approx(plain[-1]["eval/teacher_cross_entropy/far"])
