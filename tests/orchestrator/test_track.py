"""The run's memory against real MLflow stores: sqlite, a REST server in this process, and (slow) `mlflow server` itself."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tracking_uri
from orchestrator.errors import Refusal
from orchestrator.journal import Heartbeat, Journal, MetricRow, RunRecord
from orchestrator.track import Tracker, flatten, reconcile, reconcile_all

ROOT = Path(__file__).resolve().parents[2]


def rows(first: int, last: int, attempt: int = 1, value: float = 0.0) -> list[MetricRow]:
    return [MetricRow(s, attempt, {"loss": value or 1.0 / s, "lr": 0.1}, 1000.0 + s) for s in range(first, last + 1)]


def start(uri: str, folder: Path, **given: Any) -> Tracker:
    return Tracker.start(uri, "distill", folder.name, folder, given.pop("params", {}), given.pop("tags", {}), **given)


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def steps(uri: str, run_id: str, key: str = "loss") -> list[int]:
    return sorted(m.step for m in client(uri).get_metric_history(run_id, key))


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def no_leftover_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


def test_a_run_is_recorded_whole(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run", params={"train": {"lr": 2e-5, "betas": (0.9, 0.99)}, "long": "x" * 9000}, tags={"team": "a"})
    tracker.log(rows(1, 700))
    tracker.log_text("recipe", "plan/recipe.yaml")
    tracker.log_tags({"alarm.x": "rose", "state": "bad"})
    tracker.log_tags({"alarm.x": "over"})
    assert tracker.finish("FINISHED")
    run = client(uri).get_run(tracker.run_id)
    assert (run.info.status, run.info.experiment_id, run.data.tags["team"]) == ("FINISHED", tracker.experiment_id, "a")
    assert (run.data.tags["alarm.x"], run.data.tags["state"]) == ("over", "bad")
    assert run.data.params["train.lr"] == "2e-05" and len(run.data.params["long"]) == 6000
    assert steps(uri, tracker.run_id) == list(range(1, 701))
    assert [r.step for r in Journal(tmp_path / "run").rows()] == list(range(1, 701))
    assert client(uri).list_artifacts(tracker.run_id, "plan")[0].path == "plan/recipe.yaml"
    assert tracker.page == f"mlflow ui --backend-store-uri {uri}"
    assert reconcile(tmp_path / "run") == "clean"


def test_metrics_arrive_while_the_run_goes_on(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run")
    tracker.log(rows(1, 3))
    assert eventually(lambda: steps(uri, tracker.run_id) == [1, 2, 3])
    assert client(uri).get_run(tracker.run_id).info.status == "RUNNING"
    assert reconcile(tmp_path / "run") == "running"
    tracker.finish("FAILED")
    assert client(uri).get_run(tracker.run_id).info.status == "FAILED"


def test_finishing_twice_keeps_the_first_status(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run")
    tracker.finish("FAILED")
    assert tracker.finish("FINISHED")
    assert client(uri).get_run(tracker.run_id).info.status == "FAILED"


def test_a_value_that_is_not_finite_is_counted_and_kept_locally(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run")
    tracker.log([MetricRow(1, 1, {"loss": math.inf, "norm": math.nan, "lr": 0.1}, 1.0), *rows(2, 3)])
    tracker.finish("FINISHED")
    run = client(uri).get_run(tracker.run_id)
    assert (run.data.metrics["nonfinite"], run.data.tags["nonfinite.last"]) == (2.0, "step 1: loss=inf, norm=nan")
    assert steps(uri, tracker.run_id) == [2, 3] and steps(uri, tracker.run_id, "lr") == [1, 2, 3]
    local = next(iter(Journal(tmp_path / "run").rows())).values
    assert local["loss"] == math.inf and math.isnan(local["norm"])


def test_a_name_that_mlflow_refuses_does_not_hold_up_the_others(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run", params={"a=b": 1})
    tracker.log([MetricRow(1, 1, {"loss(teacher→student)": 1.0, "eval/ce": 2.0}, 1.0)])
    assert tracker.finish("FINISHED")
    run = client(uri).get_run(tracker.run_id)
    assert run.data.metrics == {"loss_teacher_student_": 1.0, "eval/ce": 2.0} and run.data.params == {"a_b": "1"}


def test_a_resumed_run_gets_no_step_twice(uri: str, tmp_path: Path) -> None:
    first = start(uri, tmp_path / "run", params={"lr": 1, "steps": 8})
    first.log(rows(1, 8))
    first.finish("KILLED")
    again = start(uri, tmp_path / "run", params={"lr": 2, "steps": 8}, run_id=first.run_id)
    assert client(uri).get_run(again.run_id).info.status == "RUNNING"
    again.truncate(5, attempt=2)
    again.log(rows(6, 12, attempt=2, value=9.0))
    again.finish("FINISHED")
    run = client(uri).get_run(again.run_id)
    assert again.run_id == first.run_id and steps(uri, again.run_id) == list(range(1, 13))
    assert (run.data.params["lr"], run.data.tags["changed.lr"], run.info.status) == ("1", "2", "FINISHED")
    assert "changed.steps" not in run.data.tags
    assert [(r.step, r.attempt) for r in Journal(tmp_path / "run").rows()] == [(s, 1 if s <= 5 else 2) for s in range(1, 13)]


def test_a_new_attempt_of_the_same_driver_gets_no_step_twice(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run")
    tracker.log(rows(1, 6))
    assert eventually(lambda: len(steps(uri, tracker.run_id)) == 6)
    tracker.truncate(4, attempt=2)
    tracker.log(rows(5, 9, attempt=2))
    tracker.finish("FINISHED")
    assert steps(uri, tracker.run_id) == list(range(1, 10))
    assert [r.step for r in Journal(tmp_path / "run").rows()] == list(range(1, 10))


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    Journal(tmp_path).append(rows(1, 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "att')
    journal = Journal(tmp_path)
    assert [r.step for r in journal.rows()] == [1, 2]
    journal.append(rows(3, 4))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_students_are_ranked_by_their_held_out_metrics(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run")
    for step, value in ((10, 3.0), (20, 1.0), (30, 2.0)):
        tracker.log([MetricRow(step, 1, {"eval/ce": value}, 1000.0 + step)])
        address = tracker.log_student(tmp_path / "student", {"eval/ce": value, "bad": math.nan}, step, {"strategy": {"type": "kd"}})
        assert address is not None and address.startswith("models:/m-")
    tracker.finish("FINISHED")
    ranked = client(uri).search_logged_models(
        [tracker.experiment_id], f"source_run_id = '{tracker.run_id}'", order_by=[{"field_name": "metrics.eval/ce", "ascending": True}]
    )
    assert [m.params["step"] for m in ranked] == ["20", "30", "10"]
    assert ranked[0].params["strategy.type"] == "kd" and str(ranked[0].status) == "READY"
    assert steps(uri, tracker.run_id, "eval/ce") == [10, 20, 30], "a student's metric is the run's own point"
    again = start(uri, tmp_path / "run", run_id=tracker.run_id)
    again.finish("FINISHED")
    assert len(client(uri).search_logged_models([tracker.experiment_id], f"source_run_id = '{tracker.run_id}'")) == 3
    assert steps(uri, tracker.run_id, "eval/ce") == [10, 20, 30]


def test_children_hang_on_their_parent_whatever_the_environment_says(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = start(uri, tmp_path / "sweep")
    monkeypatch.setenv("MLFLOW_RUN_ID", parent.run_id)
    child = start(uri, tmp_path / "trial", parent_run_id=parent.run_id)
    assert "MLFLOW_RUN_ID" not in os.environ
    child.finish("FINISHED")
    parent.finish("FINISHED")
    assert client(uri).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id != child.run_id


def test_several_drivers_may_meet_a_new_database_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    with ThreadPoolExecutor(2) as pool:
        trackers = list(pool.map(lambda name: start(uri, tmp_path / name), ["a", "b"]))
    assert all(t.finish("FINISHED") for t in trackers)
    assert trackers[0].experiment_id == trackers[1].experiment_id
    assert {m.name for m in (tmp_path / "new").iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_server_that_does_not_answer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"MLflow at http://127.0.0.1:\d+: got .*tracking_uri"):
        start(f"http://user:secret@127.0.0.1:{free_port()}", tmp_path / "run")


def test_an_unknown_run_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="has run"):
        start(uri, tmp_path / "run", run_id="0" * 32)


@pytest.mark.parametrize("kind", ["file store", "deleted experiment"])
def test_what_mlflow_will_not_open_is_refused(kind: str, uri: str, tmp_path: Path) -> None:
    if kind == "deleted experiment":
        gone = client(uri).create_experiment("gone")
        client(uri).delete_experiment(gone)
    with pytest.raises(Refusal):
        Tracker.start(uri if kind == "deleted experiment" else f"file://{tmp_path}/mlruns", "gone", "n", tmp_path / "run", {}, {})


def test_a_deleted_run_is_not_tried_for_ever(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run")
    client(uri).delete_run(tracker.run_id)
    tracker.log(rows(1, 2))
    assert not tracker.finish("FINISHED", timeout_seconds=0)
    reconcile(tmp_path / "run")
    assert reconcile(tmp_path / "run") == "clean"


# --- drivers that die


DRIVER = """
import signal, sys, time
from pathlib import Path
from orchestrator.track import Tracker, MetricRow
signal.signal(signal.SIGINT, signal.SIG_IGN)
tracker = Tracker.start(sys.argv[1], "distill", "killed", Path(sys.argv[2]), {}, {})
tracker.log([MetricRow(s, 1, {"loss": 1.0}, 1000.0 + s) for s in range(1, 6)])
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def driver(uri: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that drives a run in `tmp_path / "run"`, has logged 5 steps, and waits; it does not mind Ctrl-C."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, uri, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        assert eventually(lambda: len(watchdogs(tmp_path / "run")) == 1)
        yield process
        process.kill()


def record(folder: Path) -> RunRecord:
    found = RunRecord.load(folder)
    assert found is not None
    return found


def watchdogs(folder: Path) -> list[int]:
    command = f"orchestrator.watchdog\0{folder}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(entry.parent.name)] if command in entry.read_bytes() else []
        except OSError:  # it ended while we looked
            continue
    return found


def test_the_watchdog_outlives_ctrl_c_and_tells_the_truth_about_a_killed_driver(
    driver: subprocess.Popen[str], uri: str, tmp_path: Path
) -> None:
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(0.2)
    assert len(watchdogs(tmp_path / "run")) == 1 and driver.poll() is None
    driver.kill()
    driver.wait()
    assert eventually(lambda: not watchdogs(tmp_path / "run"))
    run_id = record(tmp_path / "run").run_id
    assert client(uri).get_run(run_id).info.status == "KILLED"
    assert steps(uri, run_id) == [1, 2, 3, 4, 5]
    assert reconcile(tmp_path / "run") == "clean"


def test_a_driver_that_ends_well_leaves_no_watchdog(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run")
    assert eventually(lambda: len(watchdogs(tmp_path / "run")) == 1)
    tracker.finish("FINISHED")
    assert not watchdogs(tmp_path / "run")


def test_the_next_command_reconciles_when_the_watchdog_died_too(driver: subprocess.Popen[str], uri: str, tmp_path: Path) -> None:
    os.kill(watchdogs(tmp_path / "run")[0], signal.SIGKILL)
    assert reconcile(tmp_path / "run") == "running"
    driver.kill()
    assert eventually(lambda: not (beat := Heartbeat.load(tmp_path / "run")) or not beat.alive()), "a zombie is dead"
    assert client(uri).get_run(record(tmp_path / "run").run_id).info.status == "RUNNING"
    assert reconcile_all(tmp_path) == {"run": "delivered"}
    assert client(uri).get_run(record(tmp_path / "run").run_id).info.status == "KILLED"
    assert steps(uri, record(tmp_path / "run").run_id) == [1, 2, 3, 4, 5]
    assert reconcile_all(tmp_path) == {"run": "clean"}


def test_a_record_that_cannot_be_read_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("torn", "whole"):
        (tmp_path / name).mkdir()
        RunRecord("https://server/", "1", name, "FINISHED", delivered=True).save(tmp_path / name)
    torn = tmp_path / "torn" / "mlflow.json"
    torn.write_text(torn.read_text()[:-9])
    assert reconcile_all(tmp_path) == {"torn": "clean", "whole": "clean"}
    assert str(torn) in caplog.text


def test_a_run_that_another_process_took_over_is_left_alone(uri: str, tmp_path: Path) -> None:
    tracker = start(uri, tmp_path / "run")
    assert reconcile(tmp_path / "run", dead_pid=1) == "running"
    tracker.finish("FINISHED")


def test_a_silent_driver_on_another_machine_is_dead_after_a_while() -> None:
    now = time.time()
    assert Heartbeat("elsewhere", 1, 0.0, now).alive()
    assert not Heartbeat("elsewhere", 1, 0.0, now - 3600).alive()
    assert not Heartbeat(socket.gethostname(), os.getpid(), 0.0, now).alive(), "the pid is someone else's by now"


# --- servers that go away


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Server:
    """MLflow's own REST application in this process, which starts and stops in an instant."""

    def __init__(self) -> None:
        from mlflow.server import app

        self.app, self.port = app, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.begin()

    def begin(self) -> None:
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self.app, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", uri)
    server = Server()
    yield server
    server.end()


def test_training_goes_on_without_the_server_and_its_metrics_arrive_once(server: Server, uri: str, tmp_path: Path) -> None:
    tracker = start(server.uri, tmp_path / "run")
    assert tracker.page == f"{server.uri}/#/experiments/{tracker.experiment_id}/runs/{tracker.run_id}"
    tracker.log(rows(1, 5))
    assert eventually(lambda: len(steps(uri, tracker.run_id)) == 5)
    server.end()
    for step in range(6, 11):
        tracker.log(rows(step, step))
        time.sleep(0.3)
    tracker.log_params({"late": 1})
    server.begin()
    tracker.log(rows(11, 12))
    assert tracker.finish("FINISHED")
    assert steps(uri, tracker.run_id) == list(range(1, 13))
    run = client(uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"late": "1"})


def test_what_a_dead_server_did_not_take_is_delivered_by_the_next_command(
    server: Server, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(server.uri, tmp_path / "run")
    server.end()
    tracker.log(rows(1, 5))
    assert tracker.log_student(tmp_path / "student", {"eval/ce": 1.0}, 5, {}, timeout_seconds=0) is None
    caplog.clear()
    assert not tracker.finish("FINISHED", timeout_seconds=1)
    said = [r.getMessage() for r in caplog.records if "next command" in r.getMessage()]
    assert len(said) == 1 and str(tmp_path / "run" / "metrics.jsonl") in said[0]
    assert not watchdogs(tmp_path / "run")
    assert reconcile_all(tmp_path) == {"run": "waiting"}
    server.begin()
    assert reconcile_all(tmp_path) == {"run": "delivered"}
    assert steps(uri, tracker.run_id) == [1, 2, 3, 4, 5]
    assert client(uri).get_run(tracker.run_id).info.status == "FINISHED"
    assert len(client(uri).search_logged_models([tracker.experiment_id], f"source_run_id = '{tracker.run_id}'")) == 1


def test_an_answer_that_was_lost_on_the_way_makes_no_second_point(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    real, calls = MlflowClient.log_batch, []

    def lost(self: Any, run_id: str, *given: Any, **named: Any) -> None:
        real(self, run_id, *given, **named)
        calls.append(run_id)
        if len(calls) == 1:
            raise MlflowException("timed out")

    tracker = start(uri, tmp_path / "run")
    monkeypatch.setattr(MlflowClient, "log_batch", lost)
    tracker.log(rows(1, 5))
    assert tracker.finish("FINISHED")
    assert steps(uri, tracker.run_id) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_real_server_killed_in_mid_run_gets_every_metric_once(tmp_path: Path) -> None:
    port, store = free_port(), f"sqlite:///{tmp_path}/server.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--artifacts-destination", str(tmp_path / "artifacts")]

    def begin() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        assert eventually(lambda: answers(port), 150)
        return process

    process = begin()
    try:
        tracker = start(f"http://127.0.0.1:{port}", tmp_path / "run")
        tracker.log(rows(1, 5))
        tracker.log_text("recipe", "plan/recipe.yaml")
        assert eventually(lambda: len(steps(store, tracker.run_id)) == 5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        tracker.log(rows(6, 10))
        time.sleep(2)
        process = begin()
        tracker.log(rows(11, 12))
        assert tracker.finish("FINISHED", timeout_seconds=60)
        assert steps(store, tracker.run_id) == list(range(1, 13))
        assert list((tmp_path / "artifacts").rglob("recipe.yaml"))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


# --- small parts


def test_nested_settings_are_dotted() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": {}, "f": [1, 2]}) == {"a.b.c": "1", "a.d": "None", "e": "{}", "f": "[1, 2]"}


def test_a_page_shows_no_password() -> None:
    assert tracking_uri.page("https://me:secret@host:1/mlflow", "7", "abc") == "https://host:1/mlflow/#/experiments/7/runs/abc"
    shown = tracking_uri.page("postgresql://me:secret@host/db?sslmode=require&password=other", "7", "abc")
    assert shown == "mlflow ui --backend-store-uri 'postgresql://host/db?sslmode=require&password=...'"
    assert tracking_uri.absolute("sqlite:///here.db") == f"sqlite:///{Path.cwd()}/here.db"


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    code = "import sys, orchestrator.track, orchestrator.watchdog; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
