"""A search end to end: one teacher pass for all trials, children of one MLflow run, a recipe that runs as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from orchestrator.config import load_job
from orchestrator.errors import Refusal
from orchestrator.journal import Journal
from orchestrator.search.book import CONTROL, TRIALS
from orchestrator.search.drive import resume_search, search
from orchestrator.search.result import SearchResult
from tests.tiny import tiny_pair

METRIC = "eval/cross_entropy"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pair(tmp_path_factory.mktemp("search"), rows=64)


def recipe(home: Path, **settings: Any) -> dict[str, Any]:
    return {
        "name": "find",
        "student": str(home / "student"),
        "strategy": {"type": "logits", "top_k": 8},
        "endpoints": {"teacher": {"model": str(home / "teacher")}},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 48},
        "train": {"steps": 4, "batch_rows": 4, "layout": "single"},
        "evaluate": {"every_steps": 2},
        "search": {"space": {"train.lr": {"choice": [1e-3, 1e-6]}}, "sampler": "grid", "concurrent": 2, "baseline": False, **settings},
    }


def cluster(home: Path) -> dict[str, Any]:
    return {"storage": str(home / "runs"), "address": "auto"}


@pytest.fixture(scope="module")
def found(home: Path, ray_session: str) -> SearchResult:
    return search(recipe(home), cluster=cluster(home))


def runs(home: Path) -> dict[str, Any]:
    """Every MLflow run, by name."""
    experiment = client(home).get_experiment_by_name("distill")
    return {run.info.run_name: run for run in client(home).search_runs([experiment.experiment_id])}


def client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{home / 'runs'}/mlflow.db")


def test_the_better_learning_rate_is_found(found: SearchResult) -> None:
    by = {t.number: t for t in found.trials}
    assert {t.outcome for t in found.trials} == {"finished"}
    assert found.best.point["train.lr"] == 1e-3
    assert by[0].metrics[METRIC] < by[1].metrics[METRIC]
    assert all(t.metrics["tokens"] == by[0].metrics["tokens"] and t.metrics["parameters"] > 0 for t in found.trials)


def test_the_teacher_reads_the_rows_once(found: SearchResult, home: Path) -> None:
    (store,) = (home / "runs" / "signals").iterdir()
    plans = [json.loads((home / "runs" / f"find-{n:03d}" / "plan.json").read_text())["fingerprints"]["signals.teacher"] for n in (0, 1)]
    assert set(plans) == {store.name.rpartition("-")[2]}
    data = json.loads(next((home / "runs" / "data").glob("data-*/manifest.json")).read_text())
    assert found.spent.teacher_tokens == data["train"]["tokens"] + data["held_out"]["tokens"]


def test_mlflow_has_one_parent_and_ended_children(found: SearchResult, home: Path) -> None:
    known = runs(home)
    parent = known["find"]
    children = [run for name, run in known.items() if name != "find"]
    assert sorted(known) == ["find", "find-000", "find-001"]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id == found.mlflow_run_id for run in children)
    assert {run.info.status for run in known.values()} == {"FINISHED"}
    assert parent.data.metrics[f"best/{METRIC}"] == pytest.approx(found.best.metrics[METRIC])
    kept = {file.path for file in client(home).list_artifacts(parent.info.run_id)}
    assert kept >= {"search.yaml", "plan.txt", "trials.jsonl", "best_recipe.yaml", "report.html", "curves.png", "parallel.png"}
    assert {"recipe.yaml", "result.json", "curves.png"} <= {f.path for f in client(home).list_artifacts(children[0].info.run_id)}


def test_the_best_recipe_runs_as_it_is_and_the_report_stands_alone(found: SearchResult) -> None:
    job = load_job(Path(found.best_recipe))
    assert (job.run.train.lr, job.run.name, job.run.tags) == (1e-3, None, {})
    page = Path(found.report).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4 and found.name in page
    assert all((Path(found.folder) / f"{name}.png").stat().st_size > 5000 for name in ("curves", "parallel", "front", "cost"))


@pytest.mark.slow
def test_a_control_without_a_teacher_is_measured_on_the_best_trials_rows(home: Path, ray_session: str) -> None:
    given = {**recipe(home, space={"train.lr": {"choice": [1e-3]}}, baseline=True), "name": "controlled"}
    found = search(given, cluster=cluster(home))
    (control,) = (t for t in found.trials if t.number == CONTROL)
    assert METRIC in control.metrics and "eval/forward_kl" in control.metrics
    assert runs(home)["controlled-control"].info.status == "FINISHED"


def test_going_on_repeats_nothing_and_tries_more(found: SearchResult, home: Path) -> None:
    before = (Path(found.folder) / TRIALS).read_text()
    again = resume_search(found.folder, cluster=cluster(home))
    assert again.best == found.best and (Path(found.folder) / TRIALS).read_text() == before
    with pytest.raises(Refusal, match="a setting that trials depend on"):
        resume_search(found.folder, ["train.steps=8"], cluster(home))


@pytest.mark.slow
def test_live_trials_take_turns_at_one_teacher_which_ends_with_the_search(found: SearchResult, home: Path) -> None:
    asked = recipe(home, concurrent=2, baseline=False) | {"name": "live", "signals": "live"}
    live = search(asked, cluster=cluster(home))
    assert [t.outcome for t in live.trials] == ["finished", "finished"]
    stored = {t.number: t.metrics[METRIC] for t in found.trials}
    assert [t.metrics[METRIC] for t in live.trials] == pytest.approx([stored[0], stored[1]], rel=1e-3)  # the store rounds
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor("live/teacher")


@pytest.mark.slow
def test_trials_that_asha_pauses_make_room_and_go_on_and_the_best_recipe_runs(home: Path, ray_session: str) -> None:
    """On two CPUs, of which two trials at once leave nothing over; then the recipe that was found, as it is."""
    rates = [1e-3, 1e-6, 1e-7, 1e-8]
    asked = {"space": {"train.lr": {"choice": rates}}, "scheduler": {"type": "asha", "reduction": 2}, "concurrent": 2, "baseline": False}
    content = recipe(home, **asked) | {"name": "halved", "train": {"steps": 8, "batch_rows": 4, "layout": "single"}}
    (home / "halved.yaml").write_text(yaml.safe_dump(content))
    (home / "two.yaml").write_text(yaml.safe_dump({"storage": str(home / "runs"), "address": "local"}))
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def command(verb: str, file: Path) -> str:
        program = "import ray; start = ray.init; ray.init = lambda **more: start(**more, num_cpus=2); from jobs.cli import main; main()"
        words = [verb, str(file), "--cluster", str(home / "two.yaml")]
        done = subprocess.run([sys.executable, "-c", program, *words], env=alone, text=True, capture_output=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command("search", home / "halved.yaml")
    events = _events(home / "runs" / "halved" / TRIALS)
    ends = {t["number"]: t["outcome"] for t in events if t["event"] == "ended"}
    assert sorted(ends) == [0, 1, 2, 3] and "paused" in ends.values() and ends[0] == "finished"
    resumed = {t["number"] for t in events if t["event"] == "resumed"}
    assert resumed, "whoever comes first pauses, and goes on"
    for number in resumed:
        steps = [row.step for row in Journal(home / "runs" / f"halved-{number:03d}").rows() if "step_seconds" in row.values]
        assert steps == list(range(1, len(steps) + 1))
    known = runs(home)
    assert {n: known[f"halved-{n:03d}"].info.status for n in ends} == {
        n: "FINISHED" if e == "finished" else "KILLED" for n, e in ends.items()
    }
    command("run", home / "runs" / "halved" / "best_recipe.yaml")


def _events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
