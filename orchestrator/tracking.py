"""The MLflow run of a run under way: opened beside its first steps, for MLflow takes seconds, and asked for again while nobody answers."""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType

from cluster.inside import submission_id
from orchestrator.config import to_yaml
from orchestrator.errors import Interrupted, RunFailed, Unanswered
from orchestrator.journal import METRICS, RunRecord
from orchestrator.plan import Plan, plan_text
from orchestrator.result import RECIPE
from orchestrator.roundtrip import JOB_TAG
from orchestrator.track import Ending, Tracker, reconcile_all
from orchestrator.tracking_uri import of_record

GRACE_SECONDS = 30.0
"""How long a run that has nothing else to do waits for MLflow."""
HASTE_SECONDS = 5.0
"""The same of one whose person will not wait."""
_LONGEST_PAUSE_SECONDS = 30.0

logger = logging.getLogger(__name__)


class Tracking:
    """Inside, `tracker` writes to the run's folder, and MLflow hears of it as soon as it answers. The run in MLflow, as a child of the run
    `parent`, has the block's end."""

    def __init__(self, plan: Plan, parent: str | None):
        self._plan, self._parent = plan, parent
        self.tracker = Tracker(plan.local)
        self.refused = False
        """Whether MLflow will not have the run, however long it is waited for."""
        self._error: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="tracking", daemon=True)

    def __enter__(self) -> Tracking:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        seconds = HASTE_SECONDS if isinstance(error, KeyboardInterrupt) else GRACE_SECONDS
        self._over.set()
        self._thread.join(seconds)
        self.tracker.finish(_ending(error), seconds)

    def opened(self) -> Tracker:
        """The tracker, once its run is open; `RunFailed` when MLflow will not have it, or still does not answer after a while."""
        self._thread.join(GRACE_SECONDS)
        self._over.set()
        self._thread.join()
        if self._error is not None:
            words = f"The run is not in MLflow, but its checkpoints are kept: distill run --resume {self._plan.folder.root}"
            raise RunFailed(f"{self._error} {words}") from self._error
        return self.tracker

    def _ask(self) -> None:
        _give_way()
        failures = 0
        while True:
            try:
                _open(self.tracker, self._plan, self._parent, settle=not failures)
            except Unanswered as error:
                self._error = error
                if not failures:
                    words = "MLflow does not open the run (%s: %s). The run goes on; its metrics wait in %s."
                    logger.warning(words, error.where, error.got, self._plan.local / METRICS)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the tracker is asked for
                self._error, self.refused = error, True
                return
            else:
                self._error = None
                return
            failures += 1
            if self._over.wait(min(_LONGEST_PAUSE_SECONDS, 2.0**failures)):
                return


def _ending(error: BaseException | None) -> Ending:
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"


def _give_way() -> None:
    """Lets this thread run when nobody else wants the processor: Ray's workers are nicer than a driver, and MLflow's import,
    which takes seconds, would hold up the first step on a small machine."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _open(tracker: Tracker, plan: Plan, parent: str | None, settle: bool) -> None:
    """Opens the MLflow run, or goes on with the folder's own; with `settle`, first tells of runs that earlier drivers left behind."""
    if settle:
        reconcile_all(plan.local.parent)
    known = RunRecord.load(plan.local)
    tracker.open(
        uri=of_record(known.uri if known else None, plan.job.cluster.tracking_uri),
        experiment=plan.job.cluster.mlflow.experiment,
        name=plan.name,
        tags=dict(plan.job.run.tags) | _job_tags(),
        run_id=known.run_id if known else None,
        parent_run_id=parent,
    )
    tracker.log_params({**plan.job.run.model_dump(mode="json"), "steps": plan.steps, "fingerprint": plan.fingerprints})
    tracker.log_text(to_yaml(plan.job.run), RECIPE)
    tracker.log_text(plan_text(plan), "plan.txt")
    for name, content in plan.text.about().items() if plan.text else ():
        tracker.log_text(content, name)


def _job_tags() -> dict[str, str]:
    """Of a run inside a submitted job: which one, as `distill jobs status` takes it."""
    job = submission_id()
    return {} if job is None else {JOB_TAG: job}
