"""Population-based training end to end: the worse trial goes on from the better one's checkpoint, and one run can do what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import load_job
from orchestrator.run import distill
from orchestrator.search.book import TRIALS
from orchestrator.search.drive import resume_search, search
from orchestrator.search.result import SearchResult
from tests.orchestrator.test_search_run import METRIC, cluster, recipe, runs
from tests.tiny import tiny_pair

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SPACE = {"train.lr": {"choice": [1e-6, 5e-3, 1e-2]}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pair(tmp_path_factory.mktemp("population"), rows=64)


def content(home: Path) -> dict[str, Any]:
    scheduler = {"type": "pbt", "every_steps": 4}
    made = recipe(home, space=SPACE, scheduler=scheduler, trials=2, seed=2, baseline=False)
    return {**made, "train": {**made["train"], "steps": 12}}


@pytest.fixture(scope="module")
def found(home: Path, ray_session: str) -> SearchResult:
    return search(content(home), cluster=cluster(home))


def test_the_worse_trial_goes_on_from_the_better_ones_checkpoint(found: SearchResult, home: Path) -> None:
    worse, better = found.trials
    assert {t.outcome for t in found.trials} == {"finished"}
    first = worse.restarts[0]
    assert (first.step, first.source) == (4, 1) and first.checkpoint.startswith(str(home / "runs" / "find-001" / "checkpoint_"))
    assert worse.legs[0] == (0, {"train.lr": 5e-3}) and worse.metrics[METRIC] < 1.01 * better.metrics[METRIC]
    known = runs(home)
    assert {"find", "find-000", "find-000-g1", "find-001"} <= set(known)
    assert {run.info.status for run in known.values()} <= {"FINISHED", "KILLED"}
    assert known[f"find-000-g{worse.generation}"].info.status == "FINISHED"


def test_one_run_with_the_schedule_that_was_found_ends_where_the_trial_did(found: SearchResult, home: Path) -> None:
    assert load_job(Path(found.best_recipe)).run.tags == {}
    trial = next(t for t in found.trials if t.restarts)
    made = content(home) | {"name": "again"}
    made["train"]["lr"] = trial.settings["train.lr"]
    again = distill(made, cluster=cluster(home))
    assert trial.metrics["tokens"] > again.metrics["tokens"]  # it also paid for what it gave up
    assert again.metrics[METRIC] == pytest.approx(trial.metrics[METRIC], rel=1e-6)


def test_a_killed_population_goes_on_with_what_was_decided(home: Path, found: SearchResult) -> None:
    given = content(home) | {"name": "killed"}
    (home / "killed.yaml").write_text(json.dumps(given))
    (home / "cluster.yaml").write_text(json.dumps(cluster(home)))
    command = [sys.executable, "-m", "jobs.cli", "search", str(home / "killed.yaml"), "--cluster", str(home / "cluster.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ.copy())
    wait_until(home / "runs" / "killed-000-g1" / "mlflow.json")
    process.kill()
    process.wait()
    before = (home / "runs" / "killed" / TRIALS).read_text()
    again = resume_search(home / "runs" / "killed", cluster=cluster(home))
    assert (home / "runs" / "killed" / TRIALS).read_text().startswith(before)
    assert [t.outcome for t in again.trials] == ["finished", "finished"]
    assert again.trials[0].legs[:2] == found.trials[0].legs[:2]
    assert {run.info.status for name, run in runs(home).items() if name.startswith("killed")} <= {"FINISHED", "KILLED"}


def wait_until(path: Path, seconds: float = 300.0) -> None:
    """Returns once a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.1)
