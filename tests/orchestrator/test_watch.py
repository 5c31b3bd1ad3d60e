"""The watch over a run: alarms rise once, clear once, and survive restarts and resumed drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.alarms import Alarms
from orchestrator.board import Entry
from orchestrator.errors import Alarmed
from orchestrator.journal import Journal, MetricRow
from orchestrator.watch import Change, Watch, stopping_words

ALARMS = Alarms.model_validate({"window_steps": 3, "entropy_collapse": {"floor_nats": 0.1}})


def entries(first: int, last: int, surprise: float, attempt: int = 1) -> list[Entry]:
    return [Entry("step", attempt, s, {"loss": 1.0, "rollout/surprise": surprise}, 100.0 + s) for s in range(first, last + 1)]


def told(changes: list[Change]) -> list[tuple[str, int, bool]]:
    return [(c.name, c.at.step, c.finding is not None) for c in changes]


def watch(folder: Path, alarms: Alarms = ALARMS) -> Watch:
    return Watch.of(alarms, folder)


def test_an_alarm_rises_once_and_clears_after_a_quiet_window(tmp_path: Path) -> None:
    seen = watch(tmp_path)
    assert told(seen.take(entries(1, 4, 1.0))) == []
    assert told(seen.take(entries(5, 9, 0.01))) == [("entropy_collapse", 7, True)]
    assert told(seen.take(entries(10, 20, 1.0))) == [("entropy_collapse", 12, False)]
    (again,) = seen.take(entries(21, 23, 0.01))
    assert "Alarm entropy_collapse at step 23: the student loses its doubts: rollout/surprise is 0.01 in steps 21 to 23" in str(again)
    assert (again.row.step, again.row.values, again.row.time) == (23, {"alarm/entropy_collapse": 1.0}, 123.0)


def test_a_restart_takes_back_alarms_that_came_after_its_start(tmp_path: Path) -> None:
    seen = watch(tmp_path)
    seen.take(entries(1, 4, 0.01))
    assert told(seen.take([Entry("attempt", 2, 1), *entries(2, 4, 1.0, 2)])) == []
    assert told(seen.take(entries(5, 7, 0.01, 2))) == [("entropy_collapse", 7, True)]
    assert told(seen.take([*entries(8, 8, 0.01, 2), Entry("attempt", 3, 7), *entries(8, 9, 0.01, 3)])) == []
    both = watch(tmp_path).take([*entries(1, 4, 0.01), Entry("attempt", 2, 1), *entries(2, 6, 1.0, 2)])
    assert told(both) == []


@pytest.mark.parametrize(("after", "expected"), [(0.01, [("entropy_collapse", 5, True)]), (1.0, [("entropy_collapse", 8, False)])])
def test_a_resumed_driver_knows_what_its_predecessor_saw(tmp_path: Path, after: float, expected: list[tuple[str, int, bool]]) -> None:
    first, journal = watch(tmp_path), Journal(tmp_path)
    old = entries(1, 4, 0.01)
    journal.append([MetricRow(e.step, 1, e.values, e.time) for e in old])
    journal.append([change.row for change in first.take(old)])
    second = watch(tmp_path)
    changes = second.take([Entry("attempt", 2, 4), *entries(5, 8, after, 2)])
    assert told(changes) == expected
    assert {c.since for c in changes} == {3}
    assert ("of step 3 still there at step 5" in str(changes[0])) == (after < 1)


@pytest.mark.parametrize(
    ("settings", "stops", "override"),
    [
        ({}, False, ""),
        ({"stop": True}, True, "alarms.stop=false"),
        ({"entropy_collapse": {"stop": True, "floor_nats": 0.1}}, True, "alarms.entropy_collapse.stop=false"),
        ({"stop": True, "entropy_collapse": {"stop": False, "floor_nats": 0.1}}, False, ""),
        ({"stop": True, "enabled": False}, False, ""),
    ],
)
def test_whether_a_run_stops_is_said_for_all_alarms_or_for_one(
    tmp_path: Path, settings: dict[str, object], stops: bool, override: str
) -> None:
    seen = watch(tmp_path, Alarms.model_validate({"window_steps": 3, "entropy_collapse": {"floor_nats": 0.1}} | settings))
    seen.take(entries(1, 6, 0.01))
    assert bool(seen.stopped) == stops
    if stops:
        words = stopping_words(seen, "runs/x", "runs/x/checkpoint_001_00000004", 4, 9)
        assert f"distill run --resume runs/x {override}. " in words and "after step 4 of 9" in words and Alarmed(words).exit_code == 3
