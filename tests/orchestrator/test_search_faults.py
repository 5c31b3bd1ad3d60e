"""A search whose driver is killed, and whose trials meet NaN: nothing that ended is repeated, and nothing is left open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.search.book import TRIALS
from orchestrator.search.drive import resume_search
from tests.orchestrator.test_search_run import cluster, recipe, runs
from tests.tiny import tiny_model, tiny_pair, tiny_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, and a student whose weights are no numbers."""
    folder = tiny_pair(tmp_path_factory.mktemp("search-faults"), rows=64)
    tokenizer = tiny_tokenizer(folder / "broken")
    model = tiny_model(folder / "broken", vocab_size=len(tokenizer))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.save_pretrained(str(folder / "broken"))
    return folder


def events(home: Path) -> list[dict[str, Any]]:
    path = home / "runs" / "find" / TRIALS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_proposal(home: Path, number: int, seconds: float = 300.0) -> None:
    """Returns once trial `number` has its MLflow run."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (home / "runs" / f"find-{number:03d}" / "mlflow.json").exists():
            return
        time.sleep(0.1)
    raise TimeoutError(f"trial {number} did not begin: {events(home)}")


def wait_for_end(home: Path, name: str, seconds: float = 90.0) -> None:
    """Returns once the MLflow run of a trial has a status that is an end."""
    end = time.monotonic() + seconds
    while runs(home)[name].info.status == "RUNNING":
        if time.monotonic() > end:
            raise TimeoutError(f"{name} is still open")
        time.sleep(0.5)


def test_a_killed_search_goes_on_repeats_nothing_and_a_nan_stops_only_itself(home: Path, ray_session: str) -> None:
    given = {**recipe(home), "baseline": False}
    students = [str(home / name) for name in ("student", "student", "broken")]
    given["search"] = {"space": {"student.model": {"choice": students}}, "sampler": "grid", "trials": 3, "baseline": False}
    (home / "search.yaml").write_text(json.dumps(given))
    (home / "cluster.yaml").write_text(json.dumps(cluster(home)))
    command = [sys.executable, "-m", "jobs.cli", "search", str(home / "search.yaml"), "--cluster", str(home / "cluster.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ.copy())
    wait_for_proposal(home, 1)
    process.kill()
    process.wait()
    wait_for_end(home, "find-001")
    before = events(home)
    journal = (home / "runs" / "find-000" / "metrics.jsonl").read_text()
    found = resume_search(home / "runs" / "find", cluster=cluster(home))
    assert events(home)[: len(before)] == before
    assert [e["number"] for e in events(home) if e["event"] == "ended"] == [0, 1, 2]
    assert (home / "runs" / "find-000" / "metrics.jsonl").read_text() == journal
    assert [t.outcome for t in found.trials] == ["finished", "finished", "failed"]
    status = {name: run.info.status for name, run in runs(home).items()}
    assert status.pop("find-002") in ("FAILED", "KILLED", "FINISHED")  # whatever came first: the NaN, its news, or the last step
    assert status == {"find": "FINISHED", "find-000": "FINISHED", "find-001": "FINISHED"}
