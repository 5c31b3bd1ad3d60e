"""Whole runs that recall what the student wrote and move by what they measure: the same curve through a kill and a stop."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run import distill
from strategies.core import Progress
from strategies.objectives.taid import TaidPace, TaidState, taid_update
from tests.orchestrator.test_faults import cluster, kill_when
from tests.orchestrator.test_on_policy import EVERY, STEPS, home, journal, recipe

__all__ = ["home"]

ROWS = 8
MOVING = {"start": 0.6, "rise": 0.2, "tolerance": -99.0}
"""Rises at every evaluation."""
STRATEGY = {"type": "distillm", "student_share": MOVING, "replay_share": {"ramp": [0.3, 1.0]}, "replay_rows": 6, "staleness": 1}
SHOWN = ("loss", "row_id_sum", "control/student_share", "age_steps", "oldest_steps", "rollout/share", "rollout/recalled")


def shown(home: Path, name: str) -> list[list[float]]:
    """What a run that recalls shows of each step."""
    return [[v.get(m, -1.0) for m in SHOWN] for v in journal(home, name).values()]


def divergences(home: Path, name: str) -> list[float]:
    """From the teacher to the student on held-out rows, of every evaluation."""
    lines = [json.loads(line)["values"] for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [values["eval/forward_kl"] for values in lines if "eval/forward_kl" in values]


@pytest.fixture(scope="module")
def undisturbed(home: Path, ray_session: str) -> list[list[float]]:
    distill(recipe(home, "recalling", STRATEGY), cluster=cluster(home))
    return shown(home, "recalling")


@pytest.mark.slow
def test_texts_are_recalled_and_the_share_moves_by_evaluations(home: Path, undisturbed: list[list[float]]) -> None:
    of = {name: [row[i] for row in undisturbed] for i, name in enumerate(SHOWN)}
    raised = [0.6 + 0.2 * max(0, (step - 1) // EVERY - 1) for step in range(1, STEPS + 1)]  # the first evaluation is remembered
    assert of["control/student_share"] == pytest.approx(raised)
    assert sum(of["rollout/recalled"]) > 0 and of["rollout/recalled"][:2] == [0, 0]
    assert max(of["oldest_steps"]) > 1 and all(a <= o for a, o in zip(of["age_steps"], of["oldest_steps"], strict=True))
    for step, recalled, oldest in zip(range(1, STEPS + 1), of["rollout/recalled"], of["oldest_steps"], strict=True):
        assert (oldest > min(step - 1, 1)) == (recalled > 0)
    newest = max(p.name for p in (home / "runs" / "recalling" / "rollouts").iterdir())
    assert int(newest) == STEPS - 1, "nobody recalls what the last step wrote"


@pytest.mark.slow
@pytest.mark.parametrize("title", ["RayTrainWorker", "MapWorker"])
def test_a_killed_process_changes_nothing(home: Path, undisturbed: list[list[float]], title: str) -> None:
    name = f"recalling-{title}"
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_when, home, name, 2 * EVERY + 2, title)
        distill(recipe(home, name, STRATEGY), cluster=cluster(home))
        assert killed.result()
    assert shown(home, name) == [pytest.approx(row, rel=1e-5) for row in undisturbed]


@pytest.mark.slow
def test_two_workers_recall_the_same(home: Path, undisturbed: list[list[float]]) -> None:
    distill(recipe(home, "recalling-two", STRATEGY, layout="ddp", workers=2), cluster=cluster(home))
    assert shown(home, "recalling-two") == [pytest.approx(row, rel=1e-4) for row in undisturbed]


@pytest.mark.slow
@pytest.mark.parametrize("student_share", [0.0, 0.5])
def test_taids_pace_in_a_run_is_that_of_its_losses_and_the_student_learns(home: Path, ray_session: str, student_share: float) -> None:
    pace, name = {"start": 0.2, "rate": 0.3, "inertia": 0.5}, f"taid-{student_share}"
    strategy: dict[str, Any] = {"type": "taid", "student_share": student_share, "pace": pace}
    result = distill(recipe(home, name, strategy), cluster=cluster(home))
    state = TaidState(0.2)
    for step, values in journal(home, name).items():
        assert values["control/taid"] == state.share
        state = taid_update(state, values["loss/kd"], Progress(step - 1, STEPS), TaidPace.model_validate(pace))
    assert state.share > 0.9
    first, *_, last = divergences(home, name)
    assert last < 0.95 * first and result.metrics["eval/forward_kl"] <= first


@pytest.mark.slow
def test_distillm_learns_its_toy(home: Path, undisturbed: list[list[float]]) -> None:
    first, *_, last = divergences(home, "recalling")
    assert last < 0.95 * first
