"""What a run does while MLflow says nothing, and who speaks for its folder. Without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import claim, delivery, fit, track, tracking
from orchestrator.claim import Pulse, claimed
from orchestrator.delivery import is_passing
from orchestrator.errors import Interrupted, Refusal, RunFailed, Unanswered
from orchestrator.fit import Fit, fitting
from orchestrator.journal import HEARTBEAT, Heartbeat, Journal, MetricRow, RunRecord
from orchestrator.track import Tracker, reconcile
from orchestrator.tracking import Tracking


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def beat(folder: Path) -> float:
    found = Heartbeat.load(folder)
    return found.beat if found else 0.0


def silent(*given: Any) -> Any:
    raise Unanswered("MLflow", "nothing", "an answer", "Wait.")


# The folder


def test_a_heart_beats_whatever_else_a_driver_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.01)
    pulse = Pulse(tmp_path)
    first = beat(tmp_path)
    assert eventually(lambda: beat(tmp_path) > first)
    pulse.end()
    assert not (tmp_path / HEARTBEAT).exists()
    assert not [t for t in threading.enumerate() if t.name == "pulse" and not t.daemon]


def test_a_tracker_that_could_not_be_opened_leaves_no_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "open_run", silent)
    with pytest.raises(Unanswered):
        Tracker.start("http://nobody", "distill", "run", tmp_path, {}, {})
    assert not (tmp_path / HEARTBEAT).exists()


def test_one_process_at_a_time_decides_about_a_record(tmp_path: Path) -> None:
    RunRecord("http://127.0.0.1:9", "1", "run").save(tmp_path)
    with claimed(tmp_path) as first, claimed(tmp_path, 0.2) as second:
        assert first and not second
        assert reconcile(tmp_path) == "running"
    with claimed(tmp_path) as again:
        assert again


def test_a_filesystem_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*given: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(claim.fcntl, "flock", no_locks)
    with claimed(tmp_path) as mine, claimed(tmp_path / "missing") as also:
        assert mine and also


def test_a_driver_that_comes_while_its_folder_is_settled_waits_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told of the old driver is told before the new one opens the run, and its record is the last."""
    RunRecord("sqlite:////x", "1", "run").save(tmp_path)
    told: list[str] = []
    begun, go = threading.Event(), threading.Event()

    class Slow:
        def __init__(self, *given: Any) -> None:
            pass

        def close(self, status: str) -> None:
            begun.set()
            assert go.wait(30)
            told.append(status)

        def push(self) -> None:
            pass

    def opened(*given: Any) -> Any:
        told.append("open")
        return None, SimpleNamespace(info=SimpleNamespace(experiment_id="1", run_id="run"))

    monkeypatch.setattr(track, "Delivery", Slow)
    monkeypatch.setattr(track, "connect", lambda uri: None)
    monkeypatch.setattr(track, "open_run", opened)
    monkeypatch.setattr(track.watchdog, "start", lambda folder: None)
    monkeypatch.setattr(track.watchdog, "release", lambda guard: None)
    old = threading.Thread(target=reconcile, args=(tmp_path,))
    old.start()
    assert begun.wait(30)
    tracker = Tracker(tmp_path)
    new = threading.Thread(target=tracker.open, args=("sqlite:////x", "distill", "run", {}, "run"))
    new.start()
    time.sleep(0.2)
    assert told == []
    go.set()
    old.join()
    new.join()
    record = RunRecord.load(tmp_path)
    assert told == ["KILLED", "open"] and record is not None and (record.status, record.delivered) == ("RUNNING", False)
    tracker.finish("FINISHED")


# MLflow


def test_what_passes_is_told_from_what_does_not() -> None:
    from mlflow.exceptions import InvalidUrlException, MlflowException, RestException
    from sqlalchemy.exc import ArgumentError, OperationalError

    passing = [
        MlflowException("API request failed with exception: connection refused"),
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "busy"}),
        OperationalError("select 1", {}, Exception("no connection")),
        ConnectionRefusedError(),
        TimeoutError(),
    ]
    staying = [
        RestException({"error_code": "UNAUTHENTICATED", "message": "who?"}),
        RestException({"error_code": "PERMISSION_DENIED", "message": "not you"}),
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no run"}),
        InvalidUrlException("Invalid url"),
        ArgumentError("no such dialect"),
        PermissionError(),
        ValueError("no such scheme"),
    ]
    assert [is_passing(e) for e in [*passing, *staying]] == [True] * len(passing) + [False] * len(staying)


def test_a_run_that_was_made_and_not_answered_for_is_found_again() -> None:
    class Client:
        made: list[str] = []  # noqa: RUF012

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

        def search_runs(self, homes: list[str], words: str, max_results: int) -> list[Any]:
            return [SimpleNamespace(name=name) for name in self.made if "abc" in words]

        def create_run(self, home: str, run_name: str, tags: dict[str, str]) -> Any:
            self.made.append(run_name)
            return SimpleNamespace(name=run_name)

    client: Any = Client()
    for _ in range(2):
        delivery._new_run(client, "http://x", "distill", "run", {delivery.OPENING: "abc"})
    assert client.made == ["run"]


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    return SimpleNamespace(local=tmp_path / "run", folder=SimpleNamespace(root=str(tmp_path / "run")))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "_LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(tracking, "_give_way", lambda: None)


@pytest.mark.usefixtures("hasty")
def test_a_silent_mlflow_is_asked_again_while_rows_wait_in_the_folder(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[bool] = []

    def opening(tracker: Tracker, plan: Any, parent: str | None, settle: bool) -> None:
        tries.append(settle)
        if len(tries) < 3:
            silent()

    monkeypatch.setattr(tracking, "_open", opening)
    with Tracking(plan, None) as run:
        run.tracker.log([MetricRow(1, 1, {"loss": 1.0}, 0.0)])
        assert [row.step for row in Journal(plan.local).rows()] == [1] and beat(plan.local)
        assert eventually(lambda: len(tries) == 3)
        assert run.opened() is run.tracker and not run.refused
    assert tries == [True, False, False] and not beat(plan.local)


@pytest.mark.usefixtures("hasty")
def test_a_run_that_mlflow_never_heard_of_fails_after_its_training(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_open", lambda *given, **named: silent())
    with pytest.raises(RunFailed, match="nothing.*distill run --resume") as caught, Tracking(plan, None) as run:
        run.opened()
    assert caught.value.exit_code == 1 and not beat(plan.local)


@pytest.mark.usefixtures("hasty")
def test_what_mlflow_refuses_is_not_asked_again(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def refusing(*given: Any, **named: Any) -> None:
        tries.append(1)
        raise Refusal("MLflow", "UNAUTHENTICATED", "a password", "Give it.")

    monkeypatch.setattr(tracking, "_open", refusing)
    with pytest.raises(RunFailed, match="UNAUTHENTICATED"), Tracking(plan, None) as run:
        assert eventually(lambda: run.refused)
        run.opened()
    assert tries == [1]


@pytest.mark.usefixtures("hasty")
def test_what_an_earlier_driver_opened_is_delivered_by_the_next_command(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_open", lambda *given, **named: silent())
    plan.local.mkdir()
    RunRecord("http://x", "1", "run", "KILLED", delivered=True).save(plan.local)
    with pytest.raises(Interrupted), Tracking(plan, None):
        raise Interrupted("stopped")
    record = RunRecord.load(plan.local)
    assert record is not None and (record.status, record.delivered) == ("KILLED", False)


# Training that nobody follows


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_leaves_no_training_behind(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    over = threading.Event()

    def stop() -> None:
        did.append("asked to stop")
        over.set()

    board = SimpleNamespace(ask_to_stop=SimpleNamespace(remote=stop))
    monkeypatch.setattr(fit, "ray", SimpleNamespace(get=lambda value: value, kill=lambda board: did.append("closed")))
    running = Fit(threading.Thread(target=over.wait, args=(30,), daemon=True), board)
    running.thread.start()
    monkeypatch.setattr(fit, "start_fit", lambda plan: running)
    plan: Any = None
    if fails:
        with pytest.raises(ValueError, match="odd"), fitting(plan):
            raise ValueError("odd")
        assert did == ["asked to stop", "closed"] and not running.thread.is_alive()
    else:
        with fitting(plan):
            pass
        assert did == ["closed"]
    over.set()
