"""The driver of a checked run: train, export, train the control, compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

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
from orchestrator.fit import Fit, fitting
from orchestrator.interrupts import interruptible
from orchestrator.ledger import Ledger, Totals
from orchestrator.logbook import Logbook
from orchestrator.mirror import mirrored
from orchestrator.plan import BASELINE, FACTS, Plan, plan_text
from orchestrator.plot import CURVES, plot_curves
from orchestrator.result import RECIPE, RESULT, Row, RunResult
from orchestrator.rollout_metrics import fates
from orchestrator.row_losses import write_losses
from orchestrator.stores import NOBODY
from orchestrator.track import Tracker
from orchestrator.tracking import Tracking
from orchestrator.tracking_uri import without_password
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
    with mirrored(plan.local, plan.folder), Tracking(plan, parent) as tracking:
        _fill_stores(plan, display)
        return _conclude(plan, _train(plan, display, tracking, listen), display)


def _fill_stores(plan: Plan, display: Display) -> None:
    """Fills the stores that the run reads; what fails here leaves the parts that are complete."""
    for each in plan.captures():
        fill(each, display)
    if plan.sources.losses:
        write_losses(plan.job, plan.sources.losses, plan.data.folder)


def _train(plan: Plan, display: Display, tracking: Tracking, listen: Listener | None = None) -> Tracker:
    """Trains to the last step; raises what ended the run before it."""
    ledger, watch = Ledger.of(plan.local), Watch.of(plan.job.run.alarms, plan.local)
    if plan.done_steps == plan.steps:
        return tracking.opened()
    with fitting(plan) as fit, display.training(plan.steps, fates(plan.strategy)), interruptible(display, fit.ask_to_stop):
        for entries in fit.entries():
            fresh = _take(entries, ledger, watch, fit, display)
            if tracking.refused or (listen is not None and listen(fresh)):
                fit.ask_to_stop()
            _tell(ledger, watch, tracking.tracker)
        _take(_kept_entries(plan), ledger, watch, fit, display)
        _tell(ledger, watch, tracking.tracker)
    if fit.error is not None:
        raise RunFailed(f"{fit.reason} Its last checkpoint is kept: distill run --resume {plan.folder.root}") from fit.error
    if ledger.step < plan.steps and watch.stopped:
        kept = checkpoint.committed(plan.folder)
        where = kept.root if kept else "none"
        raise Alarmed(stopping_words(watch, plan.folder.root, where, ledger.step, plan.steps))
    if ledger.step < plan.steps and not tracking.refused:
        raise Interrupted(f"stopped after step {ledger.step} of {plan.steps}. To go on: distill run --resume {plan.folder.root}")
    return tracking.opened()


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


def _tell(ledger: Ledger, watch: Watch, book: Logbook) -> None:
    ledger.tell(book)
    watch.tell(book)


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
        tracking_uri=without_password(plan.job.cluster.tracking_uri),
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
    with mirrored(control.local, control.folder), Tracking(control, parent.run_id) as tracking:
        student, position = _export(control, _train(control, display, tracking))
        return student_row(control, "without teacher", position.metrics, Totals.of(control.local), student)


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
