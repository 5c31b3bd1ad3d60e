"""Who may go on and what is tried next, as Ray Tune asks it, without Ray."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from orchestrator.search.book import CONTROL, Trial
from orchestrator.search.court import Court
from tests.orchestrator.search_session import Session, outcomes


def test_the_median_of_the_others_decides(tmp_path: Path) -> None:
    session = Session.of(tmp_path, scheduler={"type": "median", "min_trials": 2})
    proposals, judge = session.sides()
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        session.report(judge, session.begin(proposals, judge, name), 2, value)
    assert session.stopped == [2]


def test_without_a_scheduler_nobody_is_stopped_but_by_a_budget(tmp_path: Path) -> None:
    session = Session.of(tmp_path, tokens=50)
    proposals, judge = session.sides()
    trial = session.begin(proposals, judge, "a")
    session.report(judge, trial, 2, 9.0)
    assert session.stopped == []
    session.report(judge, trial, 6, 9.0)
    assert session.stopped == [0]
    session.end(proposals, judge, trial, 7, 9.0, "stopped")
    assert session.court.book.trials()[0].words == "the search's 50 tokens are used up"
    assert proposals.suggest("b") == "FINISHED"


def test_the_seconds_of_a_search_are_counted_from_its_start(tmp_path: Path) -> None:
    session = Session.of(tmp_path, seconds=100)
    proposals, judge = session.sides()
    trial = session.begin(proposals, judge, "a")
    session.report(judge, trial, 2, 9.0)
    assert session.stopped == []
    session.court.began -= 100
    session.report(judge, trial, 4, 9.0)
    session.end(proposals, judge, trial, 5, 9.0, "stopped")
    assert (session.stopped, session.court.book.trials()[0].words) == ([0], "the search's 100 seconds are over")
    assert proposals.suggest("b") == "FINISHED"


def test_a_trial_that_dies_stops_only_itself(tmp_path: Path) -> None:
    session = Session.of(tmp_path)
    proposals, judge = session.sides()
    lost = session.begin(proposals, judge, "a")
    lost.error = RuntimeError("out of memory")
    judge.on_trial_error(None, lost)
    proposals.on_trial_complete("a", error=True)
    session.end(proposals, judge, session.begin(proposals, judge, "b"), 4, 1.0)
    failed, finished = session.court.book.trials()
    assert (failed.outcome, failed.words, finished.outcome) == ("failed", "out of memory", "finished")


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_nan_reaches_no_scheduler(tmp_path: Path, scheduler: str) -> None:
    session = Session.of(tmp_path, scheduler={"type": scheduler, "min_trials": 1})
    proposals, judge = session.sides()
    for name in ("a", "b"):
        session.report(judge, session.begin(proposals, judge, name), 2, float("nan"))
    assert session.stopped == []


def test_proposals_end_with_the_control_of_the_best_once_all_others_ended(tmp_path: Path) -> None:
    session = Session.of(tmp_path, wants_control=True, trials=2)
    proposals, judge = session.sides()
    one, two = (session.begin(proposals, judge, name) for name in ("a", "b"))
    assert proposals.suggest("c") is None
    session.end(proposals, judge, one, 4, 2.0)
    session.end(proposals, judge, two, 4, 1.0)
    assert proposals.suggest("c") == {"number": CONTROL, "point": {"train.lr": 2}, "of": 1}
    assert proposals.suggest("d") == "FINISHED"


def test_the_best_without_a_teacher_has_no_control(tmp_path: Path) -> None:
    space = {"strategy": {"choice": ["cross-entropy", "logits"]}}
    session = Session.of(tmp_path, wants_control=True, trials=2, space=space)
    proposals, judge = session.sides()
    for name, value in (("a", 1.0), ("b", 2.0)):
        session.end(proposals, judge, session.begin(proposals, judge, name), 4, value)
    assert proposals.suggest("c") == "FINISHED"


def test_without_a_finished_trial_there_is_no_control(tmp_path: Path) -> None:
    session = Session.of(tmp_path, wants_control=True, trials=1)
    proposals, judge = session.sides()
    session.end(proposals, judge, session.begin(proposals, judge, "a"), 2, 2.0, "failed")
    assert proposals.suggest("b") == "FINISHED"


def test_what_a_person_interrupted_goes_on_first_and_what_ended_is_not_repeated(tmp_path: Path) -> None:
    session = Session.of(tmp_path, trials=3)
    proposals, judge = session.sides()
    one, two = (session.begin(proposals, judge, name) for name in ("a", "b"))
    session.end(proposals, judge, one, 4, 1.0)
    session.court.interrupt()
    assert session.stopped == [1]
    session.end(proposals, judge, two, 3, 1.0, "stopped")
    assert outcomes(session.court) == {0: "finished", 1: "running"}
    assert proposals.suggest("c") == "FINISHED"
    later = Session.of(tmp_path, trials=3)
    proposals, judge = later.sides()
    assert [later.begin(proposals, judge, name).config["number"] for name in ("d", "e")] == [1, 2]
    assert proposals.suggest("f") == "FINISHED"


def test_a_court_is_never_copied(tmp_path: Path) -> None:
    court = Session.of(tmp_path).court
    assert copy.deepcopy(court) is court
    assert not isinstance(pickle.loads(pickle.dumps(court)), Court)


@pytest.mark.parametrize("event", [Trial(0, {}, "finished"), Trial(0, {}, "failed")])
def test_a_late_report_changes_no_end(tmp_path: Path, event: Trial) -> None:
    session = Session.of(tmp_path)
    proposals, judge = session.sides()
    trial = session.begin(proposals, judge, "a")
    session.court.book.end(event)
    session.report(judge, trial, 9, 1.0)
    assert session.court.book.trials()[0].outcome == event.outcome
