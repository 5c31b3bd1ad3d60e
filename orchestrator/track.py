"""How a run is remembered: everything goes to the run's folder at once, and a thread brings it to MLflow when it can.

A silent server delays metrics and nothing else: what is not delivered when the run ends stays in the folder, and
`reconcile` brings it later. MLflow itself is spoken to in `delivery.py` alone.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cluster.storage import Folder
from orchestrator import tracking_uri, watchdog
from orchestrator.claim import claimed
from orchestrator.delivery import OPENING, Delivery, brief, connect, is_final, open_run, trouble
from orchestrator.errors import Unanswered
from orchestrator.journal import OUTBOX, RECORD, Heartbeat, Journal, Lines, MetricRow, RunRecord, Status
from orchestrator.logbook import Logbook, flatten

__all__ = ["Ending", "MetricRow", "Outcome", "Tracker", "flatten", "reconcile", "reconcile_all"]

Outcome = Literal["clean", "running", "delivered", "waiting"]
Ending = Literal["FINISHED", "FAILED", "KILLED"]

_PUSH_SECONDS = 1.0
_LOOK_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 30.0
_CLAIM_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Tracker(Logbook):
    """One run's memory: what is written reaches MLflow once the run is open there. But for `open`, nothing here waits for MLflow longer
    than it says, and nothing raises because of it."""

    run_id: str = ""
    experiment_id: str = ""
    page: str = ""
    """What a person opens: an address, or the command that serves one."""
    _delivery: Delivery
    _guard: subprocess.Popen[bytes]
    _thread: threading.Thread

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._record: RunRecord | None = None
        self._opening = uuid.uuid4().hex
        self._pushing, self._stop = threading.Lock(), threading.Event()
        self._trouble = ""

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
        """One that is open, with its first params. Raises what `open` does, and leaves no heartbeat behind then."""
        tracker = cls(folder)
        try:
            tracker.open(uri, experiment, name, tags, run_id, parent_run_id)
        except BaseException:
            tracker.close()
            raise
        tracker.log_params(params)
        return tracker

    def open(
        self, uri: str, experiment: str, name: str, tags: Mapping[str, str], run_id: str | None = None, parent_run_id: str | None = None
    ) -> None:
        """Opens a new run, or goes on with `run_id`; makes the database and the experiment when they are missing.

        May be called in any thread, and again after it raised: `Unanswered` while MLflow does not answer, another `Refusal` when it
        will not have it, as when it does not know `run_id`.
        """
        os.environ.pop("MLFLOW_RUN_ID", None)  # it would make every child process log into that run
        uri = tracking_uri.absolute(uri)
        own = {} if run_id else {OPENING: self._opening}
        tags = {**tags, **own, **({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})}
        with claimed(self._folder, _CLAIM_SECONDS) as mine:
            if not mine:
                where, got = f"run folder {self._folder}", "a process that tells MLflow how its last driver ended"
                raise Unanswered(where, got, "a folder that nobody speaks for", "Try again in a while.")
            client, run = open_run(uri, experiment, name, tags, run_id)
            record = RunRecord(uri, run.info.experiment_id, run.info.run_id)
            record.save(self._folder)
        self.run_id, self.experiment_id = record.run_id, record.experiment_id
        self.page = tracking_uri.page(record.uri, record.experiment_id, record.run_id)
        if self._stop.is_set():  # too late for whoever asked; what the folder says is delivered by the next command
            return
        self._delivery = Delivery(client, record, self._journal, self._outbox)
        self._guard = watchdog.start(self._folder)
        self._thread = threading.Thread(target=self._drain, name="track", daemon=True)
        self._record = record
        self._thread.start()

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

    def finish(self, status: Ending, timeout_seconds: float = 30) -> bool:
        """Delivers the rest and the status; False, after one warning, when MLflow does not take them in time."""
        self._stop.set()
        self._wake.set()
        if self._record is None:
            self._leave(status)
            return False
        if self._record.status != "RUNNING":
            return self._record.delivered
        self._record = replace(self._record, status=status)
        self._record.save(self._folder)
        delivered = self._insist(lambda: self._delivery.close(status), timeout_seconds)
        if delivered:
            self._record = replace(self._record, delivered=True)
            self._record.save(self._folder)
        else:
            words = "MLflow did not take the rest of run %s in %g seconds (%s). It is in %s, and the next command delivers it."
            logger.warning(words, self.run_id, timeout_seconds, self._trouble, self._journal.path)
        self._thread.join(timeout=1.0)  # longer only while a request hangs
        self.close()
        watchdog.release(self._guard)
        return delivered

    def _leave(self, status: Ending) -> None:
        """Of a run that this driver could not open: an earlier driver's is delivered by the next command, a new one when it goes on."""
        known = RunRecord.load(self._folder)
        if known is not None:
            replace(known, status=status, delivered=False).save(self._folder)
        self.close()
        when = "when the run goes on" if known is None else "by the next command"
        logger.warning("MLflow did not open the run. What it is to get is in %s, and is delivered %s.", self._journal.path, when)

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
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()
            if self._stop.is_set():
                return
            failures = 0 if self._attempt(self._delivery.push) else failures + 1
            self._stop.wait(min(_LONGEST_PAUSE_SECONDS, _PUSH_SECONDS * 2**failures))


def reconcile(folder: Path, dead_pid: int | None = None) -> Outcome:
    """Brings MLflow up to what the run's folder says, when nobody else does: the status of a run whose driver is dead, and
    whatever its server did not take. Quick and without MLflow when there is nothing to do. Never raises because of MLflow.

    `clean`: nothing to do; `running`: its driver is alive; `delivered`: done now; `waiting`: MLflow does not answer.
    `dead_pid` is a driver known to be dead or dying; a run that another process drives is left alone.
    """
    record = RunRecord.load(folder)
    if record is None or record.delivered:
        return "clean"
    with claimed(folder) as mine:  # who waits for it to open the run has beaten already, or will find it settled
        return _reconciled(folder, dead_pid) if mine else "running"


def _reconciled(folder: Path, dead_pid: int | None) -> Outcome:
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
