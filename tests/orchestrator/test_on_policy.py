"""Whole runs in which the student writes: exact ages, and the same curve when a writer or a training worker dies."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run import distill
from tests.orchestrator.test_faults import cluster, kill_when
from tests.tiny import tiny_pair

STEPS, EVERY = 10, 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pair(tmp_path_factory.mktemp("on-policy"), rows=80)


def recipe(home: Path, name: str, strategy: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "name": name,
        "student": str(home / "student"),
        "strategy": {"max_new_tokens": 8, **strategy},
        "endpoints": {"teacher": {"model": str(home / "teacher")}, "student": {"actors": 2}},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 1e-2, "layout": "single", **train},
        "checkpoint": {"every_steps": EVERY},
    }


def journal(home: Path, name: str) -> dict[int, dict[str, float]]:
    """Values of each step; asserts that each is there once."""
    lines = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in lines if "loss" in r["values"]]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    return {r["step"]: r["values"] for r in steps}


def curve(home: Path, name: str) -> list[tuple[float, float]]:
    return [(v["loss"], v["row_id_sum"]) for v in journal(home, name).values()]


def like(expected: list[tuple[float, float]], rel: float) -> list[tuple[Any, float]]:
    """Losses that agree to `rel`, on the same rows."""
    return [(pytest.approx(loss, rel=rel), rows) for loss, rows in expected]


@pytest.fixture(scope="module")
def undisturbed(home: Path, ray_session: str) -> list[tuple[float, float]]:
    distill(recipe(home, "undisturbed", {"type": "gkd", "student_share": 0.5, "staleness": 2}), cluster=cluster(home))
    return curve(home, "undisturbed")


def test_every_step_is_written_by_the_student_that_is_due(home: Path, undisturbed: list[tuple[float, float]]) -> None:
    found = journal(home, "undisturbed")
    assert [v["age_steps"] for v in found.values()] == [0, 1] + [2] * (STEPS - 2)
    assert len({loss for loss, _ in undisturbed}) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("title", ["MapWorker", "RayTrainWorker"])
def test_a_killed_writer_or_worker_changes_nothing(home: Path, undisturbed: list[tuple[float, float]], title: str) -> None:
    name = f"killed-{title}"
    content = recipe(home, name, {"type": "gkd", "student_share": 0.5, "staleness": 2})
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_when, home, name, EVERY + 2, title)
        distill(content, cluster=cluster(home))
        assert killed.result()
    assert curve(home, name) == like(undisturbed, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", {"type": "deepspeed", "zero_stage": 3}])
def test_any_layout_sends_out_the_same_student(home: Path, undisturbed: list[tuple[float, float]], layout: Any) -> None:
    kind = layout if isinstance(layout, str) else layout["type"]
    content = recipe(home, f"layout-{kind}", {"type": "gkd", "student_share": 0.5, "staleness": 2}, layout=layout, workers=2)
    distill(content, cluster=cluster(home))
    assert curve(home, f"layout-{kind}") == like(undisturbed, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"type": "opd"}, {"type": "g-opd", "reference": "teacher"}], ids=lambda s: s["type"])
def test_the_student_is_rewarded_for_what_it_wrote(home: Path, ray_session: str, strategy: dict[str, Any]) -> None:
    distill(recipe(home, strategy["type"], strategy), cluster=cluster(home))
    found = journal(home, strategy["type"])
    assert all(v["age_steps"] == 0 for v in found.values()) and all(v["grad_norm"] > 0 for v in found.values())
