"""The benchmark of the methods: what it sums up, and that nothing finished is done again. What it measures is asserted nowhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jobs import task
from tests.benchmarks.figure import Settings
from tests.benchmarks.verifiable_task import COLUMNS, compute, measure, ratio, spread, table

KEPT = dict.fromkeys(COLUMNS, 0.5)


def test_means_stand_with_the_deviation_of_a_sample() -> None:
    assert spread([0.5], "{:.1%}") == "50.0%"
    assert spread([0.4, 0.6], "{:.3f}") == "0.500 ± 0.141"
    assert spread([0.4, math.nan], "{:.3f}") == "–"


def test_the_table_has_a_line_for_the_teacher_and_each_method() -> None:
    lines = table(KEPT, {"as begun": [KEPT], "cross_entropy": [KEPT, KEPT]}).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| method", "| ---", "| teacher", "| as begun", "| cross-entropy"]
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 2}
    assert "50.0% ± 0.0%" in lines[-1]


def test_the_figure_compares_on_policy_methods_with_the_off_policy_one() -> None:
    found = {name: [{"own_reverse_kl": value}] for name, value in (("gkd", 0.1), ("opd", 0.3), ("logits", 0.4), ("kdrl", 9.0))}
    assert ratio(found) == pytest.approx(0.5)
    assert math.isnan(ratio({"gkd": found["gkd"]}))


def test_what_a_run_took_is_read_from_its_journal_and_recipe(tmp_path: Path) -> None:
    rows = [
        {"rows": 8.0, "tokens": 100.0, "step_seconds": 0.5},
        {"eval/cross_entropy": 1.0},
        {"rows": 8.0, "tokens": 60.0, "step_seconds": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, "values": values}) + "\n" for values in rows))
    (tmp_path / "recipe.yaml").write_text("{student: x, data: y, strategy: {type: gkd, samples: 4}}")
    assert compute(tmp_path) == {"texts": 64.0, "tokens": 160.0, "seconds": 0.75}


def test_what_was_measured_before_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.run.distill", lambda *_, **__: pytest.fail("a run was started"))
    monkeypatch.setattr(task, "prepare", lambda folder: None)
    home = tmp_path / "task"
    for name in ("teacher", "start", "start-1", "measured"):
        (home / name).mkdir(parents=True)
        (home / name / "config.json").touch()
    for name in ("teacher", "start", "logits", "gkd"):
        for seed in (0, 1):
            (home / "measured" / f"{name}-{seed}.json").write_text(json.dumps(KEPT))
    figure = measure(Settings(tmp_path, methods=("logits", "gkd"), seeds=(0, 1)))
    assert figure.value == 1.0
    assert set(figure.measured["runs"]) == {"as begun", "logits", "gkd"}
