"""Whole runs in which a verifier judges what the student wrote: one that is right sometimes, one that breaks, one that hangs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run import distill
from tests.orchestrator.test_faults import cluster
from tests.tiny import tiny_pair

STEPS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pair(tmp_path_factory.mktemp("verified"), rows=40)


def steps(home: Path, name: str, strategy: dict[str, Any], function: str) -> list[dict[str, float]]:
    """Values of each step of a run with that verifier."""
    verifier = {"engine": "verifier", "kind": "callable", "function": f"tests.orchestrator.verdicts:{function}", "timeout_seconds": 0.5}
    recipe = {
        "name": name,
        "student": str(home / "student"),
        "strategy": {"max_new_tokens": 6, "samples": 4, **strategy},
        "endpoints": {"teacher": {"model": str(home / "teacher")}, "verifier": verifier},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": 4, "lr": 1e-2, "layout": "single"},
    }
    distill(recipe, cluster=cluster(home))
    lines = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    found = [r["values"] for r in lines if "loss" in r["values"]]
    assert len(found) == STEPS and all(v["rollout/share"] == 1 for v in found)
    return found


@pytest.mark.slow
def test_a_run_survives_a_verifier_that_throws_and_hangs(home: Path, ray_session: str) -> None:
    found = steps(home, "broken", {"type": "kdrl", "teacher_weight": 0.1}, "broken")
    assert all(v["grad_norm"] > 0 for v in found)
    assert all(v["rows"] == 4 for v in found)
    assert sum(v["rollout/judge_failed"] for v in found) > 0
    assert all(0 <= v["rollout/reward"] <= 1 for v in found)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"type": "kdrl"}, {"type": "rlad"}], ids=lambda s: s["type"])
def test_texts_are_judged_within_their_group(home: Path, ray_session: str, strategy: dict[str, Any]) -> None:
    found = steps(home, strategy["type"], strategy, "even")
    assert all(v["rollout/judge_failed"] == 0 for v in found)
    assert 0 < sum(v["rollout/reward"] for v in found) < STEPS
