"""The driver of a checked run: train, export, train the control, compare, and keep MLflow true to it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from cluster.inside import submission_id
from cluster.resources import demands
from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.alarms import Alarms
from orchestrator.board import Entry
from orchestrator.comparison import student_row, teacher_rows
from orchestrator.config import Job, to_yaml
from orchestrator.display import Display
from orchestrator.errors import Alarmed, Interrupted, RunFailed
from orchestrator.filling import fill
from orchestrator.fit import Fit, start_fit
from orchestrator.interrupts import interruptible
from orchestrator.journal import RunRecord
from orchestrator.ledger import Ledger, Totals
from orchestrator.mirror import mirrored
from orchestrator.plan import BASELINE, FACTS, Plan, plan_text
from orchestrator.plot import CURVES, plot_curves
from orchestrator.result import RECIPE, RESULT, Row, RunResult
from orchestrator.rollout_metrics import fates
from orchestrator.roundtrip import JOB_TAG
from orchestrator.row_losses import write_losses
from orchestrator.stores import NOBODY
from orchestrator.track import Tracker, reconcile_all
from orchestrator.tracking_uri import of_record
from orchestrator.watch import Watch, stopping_words
from strategies import baseline

Listener = Callable[[Sequence[Entry]], bool]
"""Hears what a run's journal brings; says whether the run is to stop after a checkpoint."""


def drive(plan: Plan, display: Display, parent: str | None = None, listen: Listener | None = None) -> RunResult:
    """Runs a plan to its end, as a child of the MLflow run `parent`. MLflow starts beside the workers, because each takes seconds."""
    display.plan(plan_text(plan))
    if not display.verbose:
        disable_progress_bar()
    plan.folder.write(FACTS, plan.facts.to_json())
    plan.folder.write(RECIPE, to_yaml(plan.job.run).encode())
    with mirrored(plan.local, plan.folder), ThreadPoolExecutor(1, initializer=_give_way) as pool:
        tracking = pool.submit(start_tracking, plan, parent)
        _fill_stores(plan, display, tracking)
        tracker = _train(plan, display, tracking, listen)
        try:
            result = _conclude(plan, tracker, display)
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED")
            raise
        tracker.finish("FINISHED")
    return result


def _give_way() -> None:
    """Lets this thread run when nobody else wants the processor: Ray's workers are nicer than a driver, and MLflow's import,
    which takes seconds, would hold up the first step on a small machine."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def start_tracking(plan: Plan, parent: str | None) -> Tracker:
    """Opens the MLflow run, or goes on with the folder's own; settles first what earlier drivers left behind."""
    folder = plan.local
    reconcile_all(folder.parent)
    known = RunRecord.load(folder)
    tracker = Tracker.start(
        uri=of_record(known.uri if known else None, plan.job.cluster.tracking_uri),
        experiment=plan.job.cluster.mlflow.experiment,
        name=plan.name,
        folder=folder,
        params={**plan.job.run.model_dump(mode="json"), "steps": plan.steps, "fingerprint": plan.fingerprints},
        tags=dict(plan.job.run.tags) | _job_tags(),
        run_id=known.run_id if known else None,
        parent_run_id=parent,
    )
    tracker.log_text(to_yaml(plan.job.run), RECIPE)
    tracker.log_text(plan_text(plan), "plan.txt")
    for name, content in plan.text.about().items() if plan.text else ():
        tracker.log_text(content, name)
    return tracker


def _job_tags() -> dict[str, str]:
    """Of a run inside a submitted job: which one, as `distill jobs status` takes it."""
    job = submission_id()
    return {} if job is None else {JOB_TAG: job}


def _fill_stores(plan: Plan, display: Display, tracking: Future[Tracker]) -> None:
    """Fills the stores that the run reads; what fails here leaves the parts that are complete."""
    try:
        for each in plan.captures():
            fill(each, display)
        if plan.sources.losses:
            write_losses(plan.job, plan.sources.losses, plan.data.folder)
    except BaseException as error:
        tracking.result().finish("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise


def _train(plan: Plan, display: Display, tracking: Future[Tracker], listen: Listener | None = None) -> Tracker:
    """Trains to the last step; raises what ended the run before it."""
    ledger = Ledger.of(plan.local)
    if plan.done_steps == plan.steps:
        return tracking.result()
    fit, watch = start_fit(plan), Watch.of(plan.job.run.alarms, plan.local)
    with display.training(plan.steps, fates(plan.strategy)), interruptible(display, fit.ask_to_stop):
        for entries in fit.entries():
            fresh = _take(entries, ledger, watch, fit, display)
            if listen is not None and listen(fresh):
                fit.ask_to_stop()
            _tell(ledger, watch, tracking.result() if tracking.done() else None)
        _take(_kept_entries(plan), ledger, watch, fit, display)
    fit.close()
    tracker = tracking.result()
    _tell(ledger, watch, tracker)
    if fit.error is not None:
        tracker.finish("FAILED")
        raise RunFailed(f"{fit.reason} Its last checkpoint is kept: distill run --resume {plan.folder.root}") from fit.error
    if ledger.step < plan.steps and watch.stopped:
        tracker.finish("FAILED")
        kept = checkpoint.committed(plan.folder)
        where = kept.root if kept else "none"
        raise Alarmed(stopping_words(watch, plan.folder.root, where, ledger.step, plan.steps))
    if ledger.step < plan.steps:
        tracker.finish("KILLED")
        raise Interrupted(f"stopped after step {ledger.step} of {plan.steps}. To go on: distill run --resume {plan.folder.root}")
    return tracker


def _kept_entries(plan: Plan) -> list[Entry]:
    """Journal entries of the newest checkpoint: a board that was lost with the last of them is not told again."""
    last = checkpoint.committed(plan.folder)
    return [Entry(**entry) for entry in checkpoint.read_position(last).journal] if last else []


def _take(entries: list[Entry], ledger: Ledger, watch: Watch, fit: Fit, display: Display) -> list[Entry]:
    """What the journal brought that is new: kept, shown, and judged; an alarm may stop the run."""
    fresh = ledger.take(entries)
    display.progress(fresh)
    changes = watch.take(fresh)
    for change in changes:
        display.alarm(str(change))
    if any(change.stops for change in changes):
        fit.ask_to_stop()
    return fresh


def _tell(ledger: Ledger, watch: Watch, tracker: Tracker | None) -> None:
    ledger.tell(tracker)
    watch.tell(tracker)


def _conclude(plan: Plan, tracker: Tracker, display: Display) -> RunResult:
    """Exports the best checkpoint, trains the control if asked, and writes the result."""
    student, position = _export(plan, tracker)
    totals = Totals.of(plan.local)
    rows = [*teacher_rows(plan, position.metrics, totals), student_row(plan, "student", position.metrics, totals, student)]
    if plan.job.run.baseline:
        rows.append(_control(plan, tracker, display))
    control = {"without teacher": control_plan(plan).local} if plan.job.run.baseline else {}
    result = RunResult(
        name=plan.name,
        folder=plan.folder.root,
        steps=plan.steps,
        metrics={**position.metrics, "tokens": totals.tokens, "tokens_per_second": totals.tokens_per_second},
        student=_address(plan, student),
        tracking_uri=plan.job.cluster.tracking_uri,
        mlflow_run_id=tracker.run_id,
        page=tracker.page,
        curves=str(plot_curves({"student": plan.local, **control}, plan.local / CURVES)),
        comparison=tuple(rows),
    )
    content = json.dumps(asdict(result), indent=1)
    tracker.log_text(content, RESULT)
    tracker.log_file(plan.local / CURVES)
    plan.folder.write(RESULT, content.encode())
    return result


def _export(plan: Plan, tracker: Tracker) -> tuple[Path, checkpoint.Position]:
    from orchestrator.export import export_checkpoint  # imports the networks, which the driver needs only now

    source = checkpoint.best(plan.folder, plan.job.run.checkpoint.best_metric)
    assert source is not None, "a run that reached its last step has a checkpoint"
    position = checkpoint.read_position(source)
    student = plan.local / "student"
    if not student.exists():
        export_checkpoint(plan, source, student)
    if plan.folder.local is None:
        plan.folder.child(student.name).take(student)
    tracker.log_student(_address(plan, student), position.metrics, position.step, {"strategy": plan.job.run.strategy.type})
    return student, position


def _address(plan: Plan, student: Path) -> str:
    """Where the exported student is for good: in the run's folder, also where that is in remote storage."""
    return f"{plan.folder.root}/{student.name}"


def _control(plan: Plan, parent: Tracker, display: Display) -> Row:
    """The same student, rows and steps without a teacher, as a child run; held-out scores are shared."""
    control = control_plan(plan)
    if control.done_steps < control.steps:
        display.say(f"Control: the same student, rows and steps without a teacher ({control.name})")
    control.folder.write(RECIPE, to_yaml(control.job.run).encode())
    tracking: Future[Tracker] = Future()
    with mirrored(control.local, control.folder):
        tracking.set_result(start_tracking(control, parent.run_id))
        tracker = _train(control, display, tracking)
        try:
            student, position = _export(control, tracker)
            row = student_row(control, "without teacher", position.metrics, Totals.of(control.local), student)
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish("FINISHED")
    return row


def control_plan(plan: Plan) -> Plan:
    """The plan of a run's control: no stages, no endpoints, cross-entropy alone, and nobody watches: it is measured as it is."""
    strategy = baseline()
    settings = {"strategy": strategy, "baseline": False, "name": plan.name + BASELINE, "endpoints": {}, "alarms": Alarms(enabled=False)}
    run = plan.job.run.model_copy(update=settings)
    job = Job(run=run, cluster=plan.job.cluster)
    return replace(
        plan,
        job=job,
        name=plan.name + BASELINE,
        folder=Folder(plan.folder.root + BASELINE),
        strategy=run.build(),
        endpoints={},
        sources=NOBODY,
        demands=tuple(demands(job.cluster, {}, run.train.fewest_workers, sum(d.processes * d.share.cpus for d in plan.demands))),
    )
