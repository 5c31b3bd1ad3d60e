"""Successive halving: who pauses, who goes on, and that some trial always comes to its end."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.search.book import Book
from orchestrator.search.halving import Halving
from orchestrator.search.judge import Judge
from tests.orchestrator.search_session import METRIC, Asked, Session, outcomes

LAST = 20
RUNGS = (2, 4, 8, 16)
"""Steps of the rungs with a first evaluation after 2 steps and a reduction of 2."""


def halved(folder: Path, trials: int, **more: Any) -> Session:
    scheduler = {"type": "asha", "reduction": 2, **more}
    return Session.of(folder, space={"train.lr": {"uniform": [0, 1]}}, sampler="random", trials=trials, scheduler=scheduler)


def whole(session: Session, at_once: int, value: dict[int, float], fails: tuple[int, ...] = ()) -> list[int]:
    """Runs a search to its end, whose trials improve by the same amount at each step; returns the numbers in order of their starts."""
    proposals, judge = session.sides()
    under_way: list[tuple[Asked, int]] = []
    begun: list[int] = []
    while True:
        while len(under_way) < at_once and isinstance(asked := proposals.suggest(f"{len(begun)}"), dict):
            trial = Asked(asked, f"{len(begun)}")
            judge.on_trial_add(None, trial)
            known = session.court.book.get(asked["number"])
            under_way.append((trial, known.step if known else 0))
            begun.append(asked["number"])
        if not under_way:
            assert asked == "FINISHED"
            return begun
        trial, step = under_way.pop(0)
        number, step = trial.config["number"], step + 2
        reached = value[number] - 0.01 * step
        if number in fails:
            session.end(proposals, judge, trial, step, reached, "failed")
        elif step >= LAST:
            session.end(proposals, judge, trial, LAST, reached)
        else:
            session.report(judge, trial, step, reached)
            if number in session.stopped:
                session.stopped.remove(number)
                session.end(proposals, judge, trial, step, reached, "stopped")
            else:
                under_way.append((trial, step))


def two_pause(session: Session) -> None:
    """Trial 0 at the first rung and then trial 1, which is worse."""
    proposals, judge = session.sides()
    for name, value in (("a", 1.0), ("b", 2.0)):
        trial = session.begin(proposals, judge, name)
        session.report(judge, trial, 2, value)
        session.end(proposals, judge, trial, 2, value, "stopped")


def test_the_worse_of_two_pauses_and_the_book_says_why(tmp_path: Path) -> None:
    session = halved(tmp_path, trials=4)
    proposals, judge = session.sides()
    good, bad = (session.begin(proposals, judge, name) for name in ("a", "b"))
    session.report(judge, bad, 2, 2.0)
    assert session.stopped == [1], "nobody is among the best half of one"
    session.report(judge, bad, 4, 2.0)  # it trains on until the verdict reaches it
    session.report(judge, good, 2, 1.0)
    assert session.stopped == [1, 1], "asked again, and nobody else"
    session.end(proposals, judge, bad, 5, 1.9, "stopped")
    assert outcomes(session.court) == {0: "running", 1: "paused"}
    assert session.court.book.trials()[1].words == f"asha: {METRIC} 2.0000 at step 2"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_driver_that_ends_before_a_pause_is_written_down_lets_nobody_past_a_rung(tmp_path: Path, interrupted: bool) -> None:
    session = halved(tmp_path, trials=4)
    proposals, judge = session.sides()
    good, bad = (session.begin(proposals, judge, name) for name in ("a", "b"))
    session.court.interrupted = interrupted
    session.report(judge, bad, 2, 2.0)
    session.report(judge, good, 2, 1.0)
    later = halved(tmp_path, trials=4)
    proposals, judge = later.sides()
    good, bad = (later.begin(proposals, judge, name) for name in ("c", "d"))
    assert (good.config["number"], bad.config["number"]) == (0, 1)
    later.report(judge, bad, 3, 2.0)
    later.report(judge, good, 3, 1.0)
    assert later.stopped == [1]


def test_a_resumed_search_pauses_nobody_again_who_had_gone_on(tmp_path: Path) -> None:
    session = halved(tmp_path, trials=2)
    proposals, judge = session.sides()
    for name, value in (("a", 1.0), ("b", 0.5)):
        trial = session.begin(proposals, judge, name)
        session.report(judge, trial, 2, value)
        session.court.book.end(replace(session.court.book.trials()[-1], outcome="paused"))
    session.court.book.go_on(0)
    proposals, judge = halved(tmp_path, trials=2).sides()
    assert not judge.halving.hear(0, 3, 1.0)


def test_a_paused_trial_goes_on_once_it_is_among_the_best_and_is_judged_anew(tmp_path: Path) -> None:
    session = halved(tmp_path, trials=4)
    proposals, judge = session.sides()
    first = session.begin(proposals, judge, "a")
    session.report(judge, first, 2, 1.0)
    session.end(proposals, judge, first, 3, 0.9, "stopped")
    second = session.begin(proposals, judge, "b")
    assert second.config["number"] == 1, "alone it is not among the best half"
    session.report(judge, second, 2, 2.0)
    session.end(proposals, judge, second, 2, 2.0, "stopped")
    again = session.begin(proposals, judge, "c")
    assert again.config == first.config
    assert outcomes(session.court) == {0: "running", 1: "paused"}
    session.report(judge, again, 4, 0.8)
    assert session.stopped == [0, 1, 0]
    session.end(proposals, judge, again, 4, 0.8, "stopped")
    assert session.court.book.trials()[0].words == f"asha: {METRIC} 0.8000 at step 4"


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_at_the_end_the_best_share_of_each_rung_has_gone_on_and_some_trial_has_finished(tmp_path: Path, seed: int, at_once: int) -> None:
    order, count = random.Random(seed), 9
    value = dict(enumerate(order.sample(range(count), count)))
    session = halved(tmp_path, count)
    begun = whole(session, at_once, {n: float(v) for n, v in value.items()})
    ends = {t.number: t for t in session.court.book.trials()}
    assert sorted(set(begun)) == list(range(count))
    assert {t.outcome for t in ends.values()} == {"finished", "paused"}
    assert ends[min(value, key=lambda n: value[n])].outcome == "finished", "curves do not cross, so that the best is never overtaken"
    for rung in RUNGS:
        here = sorted((n for n, t in ends.items() if t.step >= rung), key=lambda n: value[n])
        gone = {n for n in here if ends[n].step > rung}
        assert gone >= set(here[: max(1, len(here) // 2)])
    assert sum(t.step for t in ends.values()) < 0.7 * count * LAST
    resumes = len(begun) - count
    assert resumes == sum(line.count('"resumed"') for line in (tmp_path / "runs" / "find" / "trials.jsonl").read_text().splitlines())


def test_a_search_whose_best_fails_takes_the_next(tmp_path: Path) -> None:
    session = halved(tmp_path, 4)
    whole(session, 1, {0: 0.0, 1: 3.0, 2: 1.0, 3: 2.0}, fails=(0,))
    ends = outcomes(session.court)
    assert (ends[0], ends[2]) == ("failed", "finished")


def test_a_search_that_goes_on_knows_who_is_where(tmp_path: Path) -> None:
    session = halved(tmp_path, 4)
    two_pause(session)
    later = halved(tmp_path, 4)
    assert Halving(later.court).next() == 0
    proposals, judge = later.sides()
    assert [later.begin(proposals, judge, name).config["number"] for name in ("c", "d")] == [0, 2]
    assert Book(tmp_path / "runs" / "find").trials()[0].outcome == "running"


def test_an_evaluation_that_passes_two_rungs_counts_at_both(tmp_path: Path) -> None:
    halving = Halving(halved(tmp_path, 4).court)
    assert halving.hear(0, 5, 1.0)
    assert halving.hear(0, 7, 1.0), "it has not paused yet"
    assert not halving.hear(1, 5, 0.5), "the best of two, at either"
    assert not halving.hear(1, 7, 3.0), "nothing takes back that it may go on"
    assert halving.hear(1, 8, 3.0)


def test_a_budget_ends_a_search_with_its_paused_trials(tmp_path: Path) -> None:
    session = halved(tmp_path, 4)
    session.court.config = session.court.config.model_copy(update={"tokens": 20})
    proposals, judge = session.sides()
    trial = session.begin(proposals, judge, "a")
    session.report(judge, trial, 2, 1.0)
    session.end(proposals, judge, trial, 2, 1.0, "stopped")
    assert (proposals.suggest("b"), outcomes(session.court)) == ("FINISHED", {0: "paused"})
    later = halved(tmp_path, 4)
    proposals, _ = later.sides()
    assert later.begin(proposals, Judge(later.court), "c").config["number"] == 1, "nobody is among the best half of one"


def test_one_that_a_budget_paused_before_its_first_rung_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    session = halved(tmp_path, 4)
    session.court.config = session.court.config.model_copy(update={"tokens": 10})
    proposals, judge = session.sides()
    trial = session.begin(proposals, judge, "a")
    session.report(judge, trial, 1, 1.0)
    session.end(proposals, judge, trial, 1, 1.0, "stopped")
    later = halved(tmp_path, 4)
    proposals, judge = later.sides()
    assert later.begin(proposals, judge, "b").config == trial.config


def test_whoever_was_stopped_holds_no_place(tmp_path: Path) -> None:
    session = halved(tmp_path, 2)
    two_pause(session)
    session.court.book.end(replace(session.court.book.trials()[0], outcome="stopped"))
    assert Halving(session.court).next() == 1


def test_a_trial_that_fails_after_a_pause_keeps_what_it_had_spent(tmp_path: Path) -> None:
    session = halved(tmp_path, 1)
    proposals, judge = session.sides()
    trial = session.begin(proposals, judge, "a")
    session.report(judge, trial, 2, 1.0)
    judge.on_trial_result(None, trial, {"step": 0, "outcome": "failed", "words": "lost"})
    (lost,) = session.court.book.trials()
    assert (lost.outcome, lost.step, lost.metrics["tokens"]) == ("failed", 2, 20.0)


def test_a_trial_that_pauses_adds_its_times_up(tmp_path: Path) -> None:
    session = halved(tmp_path, 1)
    proposals, judge = session.sides()
    trial = session.begin(proposals, judge, "a")
    session.court.book.end(session.court.book.trials()[0].__class__(0, trial.config["point"], "paused", 2, wall_seconds=5.0))
    session.court.book.go_on(0)
    judge.on_trial_result(None, trial, {"step": LAST, METRIC: 1.0, "outcome": "finished", "wall_seconds": 2.0})
    assert session.court.book.trials()[0].wall_seconds == 7.0
