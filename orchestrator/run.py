"""The driver: from a recipe to a trained, tracked and exported student. `distill` is the one public entry."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster import session
from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.board import Entry
from orchestrator.config import Job, load_job, to_yaml
from orchestrator.display import Display
from orchestrator.errors import Interrupted, RunFailed
from orchestrator.export import export_checkpoint
from orchestrator.fit import Fit, start_fit
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan, make_plan
from orchestrator.track import Tracker
from strategies.likelihood import CrossEntropyOnly

RESULT = "result.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Row:
    """One line of a comparison on the held-out rows."""

    who: str
    cross_entropy: float
    forward_kl: float | None
    top1_agreement: float | None
    parameters: int
    seconds: float
    """Wall time of its training, or of scoring for a teacher."""
    tokens_per_second: float


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind."""

    name: str
    folder: str
    steps: int
    metrics: Mapping[str, float]
    """Held-out metrics of the exported student, and totals of the run."""
    student: str
    """Folder of the exported student."""
    tracking_uri: str
    mlflow_run_id: str
    page: str
    """Where a person sees the run in MLflow."""
    comparison: tuple[Row, ...] = ()


def distill(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    cluster: str | Path | Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> RunResult:
    """Runs a recipe to its end and returns what it left.

    `recipe` and `cluster` are YAML files or mappings; `overrides` are dotted, such as `train.lr=2e-5`. Raises
    `Refusal` before anything is created, `RunFailed` or `Interrupted` afterwards.
    """
    source = Path(recipe) if isinstance(recipe, str) else recipe
    job = load_job(source, overrides, Path(cluster) if isinstance(cluster, str) else cluster)
    plan = make_plan(job, source.stem if isinstance(source, Path) else "run")
    return _run(plan, display or Display(), resumed=None)


def _run(plan: Plan, display: Display, resumed: str | None) -> RunResult:
    display.plan(plan)
    with ThreadPoolExecutor(1) as pool:
        tracking = pool.submit(_start_tracking, plan, resumed)
        session.start(plan.job.cluster, display.verbose)
        plan.folder.write(RECIPE, to_yaml(plan.job.run).encode())
        return _train(plan, display, tracking, plan.folder.child("held_out"))


def _start_tracking(plan: Plan, resumed: str | None, parent: str | None = None) -> Tracker:
    return Tracker.start(
        uri=plan.job.cluster.tracking_uri,
        experiment=plan.job.cluster.mlflow.experiment,
        name=plan.name,
        folder=_local(plan),
        params={**plan.job.run.model_dump(mode="json"), "steps": plan.steps},
        tags=dict(plan.job.run.tags),
        run_id=resumed,
        parent_run_id=parent,
    )


def _train(plan: Plan, display: Display, tracking: Future[Tracker], held_out: Folder) -> RunResult:
    began = time.time()
    fit = start_fit(plan, held_out, display.verbose)
    ledger = Ledger(_local(plan))
    tracker: Tracker | None = None
    with _interruptible(fit, display):
        for entries in fit.entries():
            fresh = ledger.take(entries)
            display.progress(plan, fresh)
            tracker = tracker or (tracking.result() if tracking.done() else None)
            if tracker:
                tracker.log(ledger.unlogged())
    tracker = tracker or tracking.result()
    tracker.log(ledger.unlogged())
    if fit.error is not None:
        tracker.finish("FAILED")
        raise RunFailed(str(fit.error)) from fit.error
    if ledger.step < plan.steps:
        tracker.finish("KILLED")
        raise Interrupted(plan.name)
    return _conclude(plan, ledger, tracker, time.time() - began)


def _conclude(plan: Plan, ledger: Ledger, tracker: Tracker, seconds: float) -> RunResult:
    source = checkpoint.best(plan.folder, plan.job.run.checkpoint.best_metric)
    assert source is not None, "a run that reached its last step has a checkpoint"
    position = checkpoint.read_position(source)
    student = export_checkpoint(plan, source, _local(plan) / "student")
    metrics = {**position.metrics, **ledger.totals(), "seconds": seconds}
    tracker.log_student(student, position.metrics, position.step, {"strategy": plan.job.run.strategy.type})
    result = RunResult(
        name=plan.name,
        folder=plan.folder.root,
        steps=plan.steps,
        metrics=metrics,
        student=str(student),
        tracking_uri=plan.job.cluster.tracking_uri,
        mlflow_run_id=tracker.run_id,
        page=tracker.page,
    )
    plan.folder.write(RESULT, json.dumps(asdict(result), indent=1).encode())
    tracker.finish("FINISHED")
    return result


def _local(plan: Plan) -> Path:
    """Local folder of a run's own small files."""
    return plan.folder.local or Path("runs") / plan.name


@contextmanager
def _interruptible(fit: Fit, display: Display) -> Iterator[None]:
    """First Ctrl-C: a checkpoint at the next step, then the end. Second: at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        display.stopping()
        threading.Thread(target=fit.ask_to_stop, daemon=True).start()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
