"""What a search says of itself: the report with its pictures, the leaderboard, and what a trial reports."""

from __future__ import annotations

import html
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.board import Entry
from orchestrator.journal import Journal, MetricRow
from orchestrator.result import RunResult
from orchestrator.search import trial as trials_module
from orchestrator.search.book import CONTROL, Book, Move, Trial
from orchestrator.search.court import Court
from orchestrator.search.door import search_plan
from orchestrator.search.leaderboard import Leaderboard
from orchestrator.search.report import BEST, cost_rows, write_report
from orchestrator.search.result import Spent
from orchestrator.search.settings import Objective
from orchestrator.search.trial import GENERATION, OUTCOME, TIME, Hearing, Spec, finished
from tests.orchestrator.bench import Bench

METRIC = "eval/cross_entropy"
OBJECTIVES = (Objective(), Objective(metric="tokens"))


def trial(number: int, rate: float, value: float, tokens: float, outcome: Any = "finished") -> Trial:
    metrics = {METRIC: value, "tokens": tokens, "seconds": 2.0}
    return Trial(number, {"train.lr": rate, "strategy.kd_weight": 0.5}, outcome, 4, metrics, wall_seconds=5.0)


def some() -> list[Trial]:
    made = [trial(n, 10.0**-n, 1.0 + n, 100.0 - n) for n in range(1, 6)]
    return [*made, replace(trial(6, 0.5, 9.0, 10.0, "paused"), words="asha: at step 2"), trial(CONTROL, 0.1, 3.0, 100.0)]


@pytest.mark.parametrize("objectives", [[METRIC], [METRIC, "tokens"]])
def test_the_report_tells_best_control_front_and_cost(bench: Bench, objectives: list[str]) -> None:
    space = {"train.lr": {"log_uniform": [1e-6, 1.0]}, "strategy.kd_weight": {"choice": [0.5, 0.9]}}
    plan = search_plan({**bench.recipe, "search": {"space": space, "objective": objectives}}, (), bench.cluster)
    plan.folder.mkdir(parents=True)
    book = Book(plan.folder)
    court = Court(plan.config, plan.spec, book, lambda t: None, True, 2)
    for one in some():
        book.propose(one.number, one.point)
        book.end(one)
        court.folder(one.number).mkdir()
        Journal(court.folder(one.number)).append([MetricRow(s, 1, {METRIC: 9.0 - s / one.number}, 0.0) for s in (2, 4)])
    (plan.folder / BEST).write_text("train: <the best>\n")
    spent = Spent(teacher_tokens=1234, teacher_seconds=3.0, seconds=40.0)
    page = write_report(plan, court, spent).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5
    assert "Best: trial 001, eval/cross_entropy 2.0000." in page and "without a teacher: 3.0000" in page
    assert "1,234 tokens in 3.0 s for all 6 trials" in page and "asha: at step 2" in page and "&lt;the best&gt;" in page
    assert ("Beaten by no other in everything: 001, 002, 003, 004, 005." in page) == (len(objectives) == 2)
    costs = cost_rows(plan, court.book.trials(), spent)
    assert costs["this search"] == {"teachers": 3.0, "training steps": 12.0, "start-up and the rest": 18.0}
    assert costs["unshared"]["teachers"] == 18.0


def test_the_report_of_a_population_tells_who_went_on_from_whom(bench: Bench) -> None:
    space = {"train.lr": {"choice": [0.5, 0.25]}}
    settings = {"scheduler": {"type": "pbt", "every_steps": 2}, "trials": 2, "concurrent": 2}
    plan = search_plan({**bench.recipe, "search": {"space": space, **settings}}, (), bench.cluster)
    plan.folder.mkdir(parents=True)
    book = Book(plan.folder)
    for number, rate in enumerate((0.5, 0.25)):
        book.propose(number, {"train.lr": rate})
    book.compare(2, [Move(1, 0, "runs/here", {"train.lr": 0.25})])
    for one in book.trials():
        book.end(replace(trial(one.number, 0.0, 1.0 + one.number, 1.0), point=one.point))
    (plan.folder / BEST).write_text("")
    page = write_report(plan, Court(plan.config, plan.spec, book, lambda t: None, True, 2), Spent()).read_text(encoding="utf-8")
    assert "<td>001</td><td>1</td><td>2</td><td>000</td><td>runs/here</td>" in page
    assert html.escape("{'steps': [[0, 0.5], [2, 0.25]]}") in page


def test_the_leaderboard_has_the_best_first_and_those_without_a_value_last() -> None:
    lost = replace(trial(0, 1.0, 0.1, 1.0), outcome="failed", words="nan")
    shown = io.StringIO()
    Console(file=shown, width=120).print(Leaderboard(OBJECTIVES, ["train.lr"]).table([lost, *some()]))
    lines = [line for line in shown.getvalue().splitlines() if any(s in line for s in ("finished", "paused", "failed"))]
    assert [line.split("│")[1].strip() for line in lines] == ["001", "without teacher", "002", "003", "004", "005", "006", "000"]


def entry(kind: str, step: int, **values: float) -> Entry:
    return Entry(kind, 1, step, values)


def test_a_trial_reports_evaluations_once_with_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, float]] = []
    monkeypatch.setattr(trials_module.tune, "report", told.append)
    hearing = Hearing((Objective(),), steps=6, tokens=5.0)
    step = {"tokens": 10.0, "step_seconds": 0.5}
    assert not hearing([entry("step", 1, **step), entry("eval", 2, **{METRIC: 1.5}), entry("held", 0)])
    assert not hearing(
        [entry("attempt", 0), entry("step", 2, **step), entry("eval", 2, **{METRIC: 1.5}), entry("eval", 6, **{METRIC: 1.0})]
    )
    assert told == [{METRIC: 1.5, "tokens": 15.0, "seconds": 0.5, TIME: 2, GENERATION: 0}]  # the last is reported with the run's end
    assert (hearing.metrics[METRIC], hearing.metrics["tokens"], hearing.step) == (1.0, 25.0, 6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_objective_that_is_no_number_ends_its_trial(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(trials_module.tune, "report", lambda metrics: pytest.fail("nothing to report"))
    hearing = Hearing((Objective(),), steps=6)
    assert hearing([entry("eval", 2, **{METRIC: value})])
    assert hearing.trouble == f"{METRIC} was {value} at step 2"


def test_what_was_spent_is_added_up_over_drivers(tmp_path: Path) -> None:
    assert Spent.load(tmp_path) == Spent()
    Spent(1, 2.0, 3.0).save(tmp_path)
    assert Spent.load(tmp_path).plus((), 4.0) == Spent(1, 2.0, 7.0)


@pytest.mark.parametrize(
    ("metrics", "outcome", "words"),
    [({METRIC: 2.0}, "finished", ""), ({METRIC: math.nan}, "failed", f"{METRIC} is nan"), ({}, "failed", f"{METRIC} is None")],
)
def test_a_run_that_cannot_be_judged_has_failed(tmp_path: Path, metrics: dict[str, float], outcome: str, words: str) -> None:
    spec = Spec("find", {}, {"storage": str(tmp_path)}, ".", (Objective(),))
    (tmp_path / "find-000").mkdir()
    Journal(tmp_path / "find-000").append([MetricRow(s, 1, {"tokens": 10.0, "step_seconds": 0.5}, 0.0) for s in (1, 2)])
    rows = ({"who": "teacher", "parameters": 9}, {"who": "student", "parameters": 7})
    result = RunResult("n", str(tmp_path), 2, metrics, "", "", "", "", "", rows)  # type: ignore[arg-type]
    told = finished(spec, result, Trial(0, {}))
    assert (told[OUTCOME], told["words"], told[TIME]) == (outcome, words, 2)
    assert (told["tokens"], told["seconds"], told["parameters"]) == (20.0, 1.0, 7.0)
