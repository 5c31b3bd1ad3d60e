"""A run whose teacher is behind a URL: the same curve as with the teacher's model in the run's own actors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.fake_server import Behaviour, FakeServer, make_scorer
from orchestrator.run import distill
from tests.tiny import source_text, tiny_model, tiny_tokenizer

STEPS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny_tokenizer(folder / "student")
    tokenizer.save_pretrained(folder / "teacher")
    tiny_model(folder / "student", vocab_size=len(tokenizer))
    tiny_model(folder / "teacher", vocab_size=len(tokenizer), width=48, seed=1)
    lines = [line for line in source_text().splitlines() if line.strip()][:200]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def run(home: Path, name: str, teacher: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Metrics of every step, and those of held-out rows at the end."""
    recipe = {
        "name": name,
        "student": str(home / "student"),
        "strategy": {"type": "logits", "top_k": 8},
        "endpoints": {"teacher": teacher},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 16, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 3e-3, "layout": "single", "micro_batch_tokens": 128},
    }
    result = distill(recipe, cluster={"storage": str(home / "runs"), "address": "auto"})
    rows = [json.loads(line)["values"] for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r], dict(result.metrics)


@pytest.mark.slow
def test_a_teacher_behind_a_url_gives_the_curve_of_one_in_the_run(home: Path, ray_session: str) -> None:
    local, local_end = run(home, "local", {"model": str(home / "teacher")})
    behaviour = Behaviour(context_tokens=512, max_top_k=20)
    with FakeServer(make_scorer(str(home / "teacher"), 0), "big", behaviour) as server:
        endpoint = {"engine": "openai", "base_url": server.url, "model": "big", "vocabulary": 512, "tokenizer": str(home / "teacher")}
        extra = {"local_model": str(home / "teacher"), "max_calibration_error": 1e-4, "price_per_million_tokens": 2.0}
        served, served_end = run(home, "served", endpoint | extra)
    assert [s["loss"] for s in served] == pytest.approx([s["loss"] for s in local], rel=1e-5)
    assert served_end["eval/forward_kl"] == pytest.approx(local_end["eval/forward_kl"], rel=1e-5)
    for step in served:  # a row's last loss token is its last token, so all tokens are sent
        assert step["cost/teacher"] == pytest.approx(2.0 * step["tokens"] / 1e6, rel=1e-5)
    assert not any("cost/teacher" in s for s in local)
