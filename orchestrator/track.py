"""How a run is remembered: everything goes to the run's folder at once, and a thread brings it to MLflow when it can.

A silent server delays metrics and nothing else: what is not delivered when the run ends stays in the folder, and
`reconcile` brings it later. MLflow itself is spoken to in `delivery.py` alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.storage import Folder
from orchestrator import tracking_uri, watchdog
from orchestrator.delivery import Delivery, brief, connect, is_final, open_run, trouble
from orchestrator.journal import HEARTBEAT, OUTBOX, RECORD, Heartbeat, Journal, Lines, MetricRow, RunRecord, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MetricRow", "Outcome", "Tracker", "flatten", "reconcile", "reconcile_all"]

Outcome = Literal["clean", "running", "delivered", "waiting"]

_PUSH_SECONDS = 1.0
_BEAT_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 30.0

logger = logging.getLogger(__name__)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and texts: `{"train": {"lr": 2e-5}}` becomes `{"train.lr": "2e-05"}`."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


class Tracker:
    """One run's memory. `log`, `log_params`, `log_text` and `log_file` never wait for MLflow and never raise because of it."""

    run_id: str
    experiment_id: str
    page: str
    """What a person opens: an address, or the command that serves one."""

    def __init__(self, folder: Path, record: RunRecord, client: MlflowClient, guard: subprocess.Popen[bytes]):
        self.run_id, self.experiment_id = record.run_id, record.experiment_id
        self.page = tracking_uri.page(record.uri, record.experiment_id, record.run_id)
        self._folder, self._record, self._guard = folder, record, guard
        self._journal, self._outbox = Journal(folder), Lines(folder / OUTBOX)
        self._delivery = Delivery(client, record, self._journal, self._outbox)
        self._pushing, self._wake, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self._trouble = ""
        self._thread = threading.Thread(target=self._drain, name="track", daemon=True)
        self._thread.start()

    @classmethod
    def start(  # noqa: PLR0913 - each is named where it is called, and none has a default worth guessing
        cls,
        uri: str,
        experiment: str,
        name: str,
        folder: Path,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
        parent_run_id: str | None = None,
    ) -> Tracker:
        """Opens a new run, or goes on with `run_id`; makes the database and the experiment when they are missing.

        May be called in any thread. Raises `Refusal` when MLflow does not answer or does not have `run_id`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        Heartbeat.now().save(folder)  # first, so that the watchdog of an earlier driver lets go
        os.environ.pop("MLFLOW_RUN_ID", None)  # it would make every child process log into that run
        uri = tracking_uri.absolute(uri)
        tags = dict(tags) | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
        client, run = open_run(uri, experiment, name, tags, run_id)
        record = RunRecord(uri, run.info.experiment_id, run.info.run_id)
        record.save(folder)
        tracker = cls(folder, record, client, watchdog.start(folder))
        tracker.log_params(params)
        return tracker

    def log(self, rows: Sequence[MetricRow]) -> None:
        """Within one attempt, the steps of a metric rise. A value that is not finite stays local and is counted by the
        metric `nonfinite` of its step."""
        self._journal.append(rows)
        self._wake.set()

    def truncate(self, step: int, attempt: int) -> None:
        """Attempt `attempt` starts after `step`. What older attempts wrote beyond it leaves the local journal; MLflow keeps
        what it has, and gets no second value for those steps."""
        self._journal.truncate(step, attempt)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested settings under dotted names. A param that MLflow has with another value becomes the tag `changed.<name>`."""
        self._outbox.append([{"kind": "params", "params": flatten(params)}])
        self._wake.set()

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; of two values of one tag the later stays."""
        self._outbox.append([{"kind": "tags", "tags": dict(tags)}])
        self._wake.set()

    def log_text(self, text: str, artifact_file: str) -> None:
        """A text artifact of the run, at a relative path such as `plan/recipe.yaml`."""
        self._outbox.append([{"kind": "text", "text": text, "file": artifact_file}])
        self._wake.set()

    def log_file(self, path: Path) -> None:
        """A file of the run's folder as an artifact under its own name, as it is when MLflow takes it."""
        self._outbox.append([{"kind": "file", "path": str(path.absolute())}])
        self._wake.set()

    def log_student(
        self, folder: str | Path, metrics: Mapping[str, float], step: int, params: Mapping[str, Any], timeout_seconds: float = 15
    ) -> str | None:
        """Records the student in `folder`, a path or a URI, as a LoggedModel ranked by held-out `metrics`; weights are not copied.
        Returns its `models:/` address, or None when MLflow does not take it in time (then it is delivered later)."""
        home = Folder.of(str(folder)).root
        key = f"{home.rpartition('/')[2]}@{step}"
        student = {"key": key, "folder": home, "step": step, "params": flatten(params)}
        self._outbox.append([{"kind": "student", "metrics": {k: v for k, v in metrics.items() if math.isfinite(v)}, **student}])
        self._insist(self._delivery.push, timeout_seconds)
        return self._delivery.students.get(key)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"], timeout_seconds: float = 30) -> bool:
        """Delivers the rest and the status; False, after one warning, when MLflow does not take them in time."""
        if self._record.status != "RUNNING":
            return self._record.delivered
        self._record = replace(self._record, status=status)
        self._record.save(self._folder)
        self._stop.set()
        self._wake.set()
        delivered = self._insist(lambda: self._delivery.close(status), timeout_seconds)
        if delivered:
            self._record = replace(self._record, delivered=True)
            self._record.save(self._folder)
        else:
            words = "MLflow did not take the rest of run %s in %g seconds (%s). It is in %s, and the next command delivers it."
            logger.warning(words, self.run_id, timeout_seconds, self._trouble, self._journal.path)
        self._thread.join(timeout=1.0)  # longer only while a request hangs
        (self._folder / HEARTBEAT).unlink(missing_ok=True)  # from here on anybody may reconcile
        self._journal.close()
        self._outbox.close()
        watchdog.release(self._guard)
        return delivered

    def _insist(self, action: Callable[[], None], timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        while True:
            if self._attempt(action, max(0.0, deadline - time.monotonic())):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)

    def _attempt(self, action: Callable[[], None], lock_seconds: float = -1) -> bool:
        if not self._pushing.acquire(timeout=lock_seconds):
            self._trouble = self._trouble or "a request is under way"
            return False
        try:
            action()
        except trouble() as error:
            if not self._trouble:
                logger.warning("MLflow does not take metrics (%s). The run goes on; they wait in %s.", brief(error), self._journal.path)
            self._trouble = brief(error)
            return False
        finally:
            self._pushing.release()
        self._trouble = ""
        return True

    def _drain(self) -> None:
        failures = 0
        while not self._stop.is_set():
            self._wake.wait(_BEAT_SECONDS)
            self._wake.clear()
            if self._stop.is_set():
                return
            with contextlib.suppress(OSError):  # a full disk stops the beat, not the delivery
                Heartbeat.now().save(self._folder)
            failures = 0 if self._attempt(self._delivery.push) else failures + 1
            self._stop.wait(min(_LONGEST_PAUSE_SECONDS, _PUSH_SECONDS * 2**failures))


def reconcile(folder: Path, dead_pid: int | None = None) -> Outcome:
    """Brings MLflow up to what the run's folder says, when nobody else does: the status of a run whose driver is dead, and
    whatever its server did not take. Quick and without MLflow when there is nothing to do. Never raises because of MLflow.

    `clean`: nothing to do; `running`: its driver is alive; `delivered`: done now; `waiting`: MLflow does not answer.
    `dead_pid` is a driver known to be dead or dying; a run that another process drives is left alone.
    """
    record, beat = RunRecord.load(folder), Heartbeat.load(folder)
    if record is None or record.delivered:
        return "clean"
    if beat is not None and beat.pid != dead_pid and beat.alive():
        return "running"
    status: Status = "KILLED" if record.status == "RUNNING" else record.status
    try:
        Delivery(connect(record.uri), record, Journal(folder), Lines(folder / OUTBOX)).close(status)
    except trouble() as error:
        logger.warning("MLflow does not take the rest of run %s (%s); it stays in %s.", record.run_id, brief(error), folder)
        if not is_final(error):
            return "waiting"
    replace(record, status=status, delivered=True).save(folder)
    return "delivered"


def reconcile_all(storage: Path) -> dict[str, Outcome]:
    """`reconcile` for every run folder in `storage`, by folder name. A server that does not answer is asked once."""
    outcomes: dict[str, Outcome] = {}
    silent: set[str] = set()
    for path in sorted(storage.glob(f"*/{RECORD}")):
        record = RunRecord.load(path.parent)
        if record is not None and not record.delivered and record.uri in silent:
            outcomes[path.parent.name] = "waiting"
            continue
        outcome = outcomes[path.parent.name] = reconcile(path.parent)
        if record is not None and outcome == "waiting":
            silent.add(record.uri)
    return outcomes
