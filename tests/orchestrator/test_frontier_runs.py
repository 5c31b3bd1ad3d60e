"""Whole runs at the edge of what the student can do: pairs, pass rates, and mended mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run import distill
from tests.orchestrator.test_faults import cluster
from tests.tiny import tiny_pair

STEPS = 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pair(tmp_path_factory.mktemp("frontier"), rows=40)


def steps(home: Path, name: str, strategy: dict[str, Any], function: str = "even", **train: Any) -> list[dict[str, float]]:
    """Values of each step of a run with that verifier."""
    recipe = {
        "name": name,
        "student": str(home / "student"),
        "strategy": {"max_new_tokens": 8, **strategy},
        "endpoints": {
            "teacher": {"model": str(home / "teacher")},
            "verifier": {"engine": "verifier", "kind": "callable", "function": f"tests.orchestrator.verdicts:{function}"},
        },
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 64},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 1e-2, "layout": "single", "lr_schedule": "constant", **train},
    }
    distill(recipe, cluster=cluster(home))
    lines = [json.loads(line)["values"] for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    found = [values for values in lines if "loss" in values]
    assert len(found) == STEPS
    return found


def test_preference_begins_at_log_two_and_is_learnt(home: Path, ray_session: str) -> None:
    found = steps(home, "soda", {"type": "soda"}, micro_batch_tokens=128)
    assert found[0]["loss/dpo"] == pytest.approx(math.log(2), rel=1e-5) and found[0]["rollout/share"] == 0.5
    assert found[-1]["loss/dpo"] < 0.3 and found[-1]["loss/rejected"] - found[-1]["loss/chosen"] > 1
    assert found[0]["loss"] == found[0]["loss/dpo"] and found[0]["micro_batches"] > 1


def test_a_teachers_texts_are_preferred_where_the_students_are_wrong(home: Path, ray_session: str) -> None:
    found = steps(home, "soda-teacher", {"type": "soda", "teacher": "teacher", "verifier": "verifier"}, workers=2, layout="ddp")
    assert found[0]["loss/dpo"] == pytest.approx(math.log(2), rel=1e-5) and found[-1]["loss/dpo"] < 0.5
    assert all(0 < v["rollout/passed"] < 1 for v in found)


def test_texts_are_weighed_by_their_prompts_pass_rate(home: Path, ray_session: str) -> None:
    found = steps(home, "paced", {"type": "paced", "samples": 4, "take": {"type": "topk", "top_k": 16}})
    assert all(v["rollout/share"] == 1 and v["grad_norm"] > 0 for v in found)
    assert 0.1 < sum(v["rollout/passed"] for v in found) / STEPS < 0.9
    assert found[-1]["loss/forward"] < found[0]["loss/forward"]


@pytest.mark.parametrize("variant", ["direct", "combine"])
def test_mended_mistakes_are_learnt(home: Path, ray_session: str, variant: str) -> None:
    found = steps(home, f"personalised-{variant}", {"type": "personalised", "variant": variant})
    assert all(v["repair/attempts"] == v["repair/passed"] + v["repair/failed"] == 8 for v in found)
    assert sum(v["repair/repaired"] for v in found) > 0 and all(v["repair/repaired"] <= v["repair/failed"] for v in found)
    assert all(v["rollout/share"] == 1 and v["rollout/passed"] == v["repair/passed"] / 8 and v["rollout/surprise"] > 0 for v in found)


def test_a_student_without_faults_ends_its_run_as_it_began(home: Path, ray_session: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = steps(home, "faultless", {"type": "personalised"}, "right", workers=2, layout="ddp")
    assert "nothing to learn (repair/attempts 8, repair/passed 8)" in capsys.readouterr().err
    assert all(v["repair/passed"] == 8 and v["tokens"] == v["loss"] == v["grad_norm"] == 0 for v in found)
