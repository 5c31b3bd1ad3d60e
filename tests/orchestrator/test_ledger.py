"""The driver's record: each step once, whatever attempts, replays and earlier drivers said."""

from __future__ import annotations

from pathlib import Path

from orchestrator.board import Entry
from orchestrator.journal import Journal, MetricRow
from orchestrator.ledger import Ledger, Totals


def step(number: int, attempt: int = 1) -> Entry:
    return Entry("step", attempt, number, {"tokens": 10.0, "step_seconds": 0.5, "score_seconds/t": 0.2})


def test_a_new_attempt_takes_back_what_came_after_its_start() -> None:
    ledger = Ledger()
    ledger.take([Entry("attempt", 1, 0), *(step(n) for n in range(1, 8))])
    fresh = ledger.take([Entry("attempt", 2, 5), *(step(n, 2) for n in (4, 5, 6, 7, 8))])
    assert [e.step for e in fresh if e.kind == "step"] == [6, 7, 8]
    assert ledger.step == 8


def test_a_resumed_driver_writes_nothing_twice_and_fills_what_its_predecessor_missed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([MetricRow(n, 1, {"loss": 1.0}, 0.0) for n in (1, 2, 3)])
    journal.append([MetricRow(2, 1, {"eval/cross_entropy": 1.0}, 0.0)])
    ledger = Ledger.of(tmp_path)
    replayed = [Entry("attempt", 2, 5), *(step(n) for n in range(1, 6)), Entry("eval", 1, 2, {}), Entry("eval", 1, 4, {})]
    fresh = ledger.take(replayed)
    assert [e.step for e in fresh if e.kind == "step"] == [4, 5]
    assert [e.step for e in fresh if e.kind == "eval"] == [4]


def test_totals_are_those_of_the_lineage(tmp_path: Path) -> None:
    """Steps that were done again count once, and so do those of an earlier driver."""
    journal = Journal(tmp_path)
    journal.append([MetricRow(e.step, e.attempt, e.values, 0.0) for e in (step(1), step(2), step(3))])
    journal.truncate(1, 2)
    journal.append([MetricRow(2, 2, step(2, 2).values, 0.0), MetricRow(2, 2, {"eval/cross_entropy": 1.0}, 0.0)])
    totals = Totals.of(tmp_path)
    assert (totals.tokens, totals.seconds, totals.score_seconds) == (20.0, 1.0, {"t": 0.4})
    assert totals.tokens_per_second == 20.0
