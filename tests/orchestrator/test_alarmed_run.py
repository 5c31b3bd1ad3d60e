"""A whole run that an alarm stops: a checkpoint, the exit code, words with the way on, a truthful MLflow; and the run goes on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from jobs import cli
from orchestrator.journal import RunRecord
from tests.orchestrator.test_on_policy import recipe
from tests.tiny import tiny_pair

STEPS = 14


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_pair(tmp_path_factory.mktemp("alarmed"), rows=80)
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"storage": str(folder / "runs"), "address": "auto"}))
    return folder


def command(arguments: list[str], home: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and standard error of `distill ...` in this process."""
    patch.setattr(sys, "argv", ["distill", *arguments, "--cluster", str(home / "cluster.yaml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, " ".join(capsys.readouterr().err.split())


def rows(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "runs" / "alarmed" / "metrics.jsonl").read_text().splitlines()]


def in_mlflow(home: Path) -> Any:
    record = RunRecord.load(home / "runs" / "alarmed")
    assert record is not None
    return MlflowClient(record.uri).get_run(record.run_id)


@pytest.mark.slow
def test_an_alarm_stops_a_run_which_then_goes_on(
    home: Path, ray_session: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(home, "alarmed", {"type": "gkd", "base": "first"}, steps=STEPS)
    content["endpoints"] |= {"first": {"model": str(home / "student")}, "student": {"actors": 1}}
    content |= {"checkpoint": {}, "alarms": {"stop": True, "window_steps": 2, "entropy_collapse": {"floor_nats": 100.0}}}
    (home / "recipe.yaml").write_text(yaml.safe_dump(content))

    code, said = command(["run", str(home / "recipe.yaml")], home, monkeypatch, capsys)
    assert code == 3, said
    assert "Alarm entropy_collapse at step 2: the student loses its doubts: rollout/surprise is" in said
    (stopped,) = re.findall(rf"Alarmed: stopped by the alarm entropy_collapse after step (\d+) of {STEPS}", said)
    (kept,) = re.findall(r"Its checkpoint is (\S+)\.", said)
    assert 2 <= int(stopped) < STEPS and kept.endswith(f"_{int(stopped):08d}") and (Path(kept) / "progress.json").exists()
    steps = {r["step"]: r["values"] for r in rows(home) if "loss" in r["values"]}
    assert list(steps) == list(range(1, int(stopped) + 1))
    assert abs(steps[1]["rollout/kl_to_base"]) < 1e-5 < abs(steps[int(stopped)]["rollout/kl_to_base"])  # the first text is the base's own
    assert steps[1]["score_seconds/first"] > 0
    assert [(r["step"], r["values"]) for r in rows(home) if "alarm/entropy_collapse" in r["values"]] == [(2, {"alarm/entropy_collapse": 1})]
    run = in_mlflow(home)
    assert (run.info.status, run.data.metrics["alarm/entropy_collapse"]) == ("FAILED", 1)
    assert run.data.tags["alarm.entropy_collapse"].startswith("Alarm entropy_collapse at step 2")

    (way,) = re.findall(r"To go on all the same: distill (.*?)\. To", said)
    code, said = command(way.split(), home, monkeypatch, capsys)
    assert code == 0, said
    assert f"Alarm entropy_collapse of step 2 still there at step {int(stopped) + 1}: the student" in said
    assert sorted(r["step"] for r in rows(home) if "loss" in r["values"]) == list(range(1, STEPS + 1))
    assert in_mlflow(home).info.status == "FINISHED"
