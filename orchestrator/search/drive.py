"""The front door of a search: `search` and `resume_search`. Fills shared stores, lets Tune run trials, writes what was found."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cluster.storage import Folder
from orchestrator import watchdog
from orchestrator.config import load_cluster, read_content, to_yaml
from orchestrator.display import Display
from orchestrator.errors import Interrupted, Refusal, RunFailed
from orchestrator.filling import Filled, fill
from orchestrator.interrupts import interruptible
from orchestrator.journal import MetricRow, RunRecord
from orchestrator.mirror import mirrored
from orchestrator.owner import COPY, home_of, small_files
from orchestrator.plan import make_plan
from orchestrator.run import planned_with_ray, tell_of_room, with_texts
from orchestrator.search.book import CONTROL, SEARCH, TRIALS, Book, Trial, front, ranked
from orchestrator.search.court import Court
from orchestrator.search.door import SearchPlan, going_on, search_plan
from orchestrator.search.folders import check_goes_on
from orchestrator.search.judge import Judge
from orchestrator.search.leaderboard import Leaderboard
from orchestrator.search.plan_text import search_text
from orchestrator.search.proposals import Proposals
from orchestrator.search.report import BEST, REPORT, write_report
from orchestrator.search.result import SearchResult, Spent
from orchestrator.search.sharing import pools
from orchestrator.search.trial import run_trial
from orchestrator.track import Tracker, reconcile, reconcile_all
from orchestrator.tracking_uri import of_record

POLL_SECONDS = 0.25
SETTLE_SECONDS = 60.0
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",
}
"""Tune writes no logs of its own, leaves the working folder alone, and waits for a trial's thread before its process is used again."""


def search(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    cluster: str | Path | Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> SearchResult:
    """Searches around a recipe with a `search:` block. Arguments as for `orchestrator.run.distill`.

    Raises `Refusal` before anything is created, `RunFailed` when no trial finished, `Interrupted` when a person stopped it.
    """
    source = Path(recipe) if isinstance(recipe, str) else recipe
    where = cluster_content(Path(cluster) if isinstance(cluster, str) else cluster)
    return _run(lambda: search_plan(source, overrides, where), where, display or Display())


def resume_search(
    folder: str | Path,
    overrides: Sequence[str] = (),
    cluster: str | Path | Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> SearchResult:
    """Goes on with a search: what has ended is not repeated, what was under way goes on from its checkpoints.

    `overrides` may change budgets (`search.trials=16`); `Refusal` for those that change what trials are.
    """
    where = cluster_content(Path(cluster) if isinstance(cluster, str) else cluster)
    home = home_of(Folder.of(str(folder)), str(where.get("storage", "")))  # the search's own, where its small files are named
    own = small_files(home)
    if not ((own / SEARCH).exists() or home.child(COPY).exists(SEARCH)):
        raise Refusal(f"--resume {folder}", f"a folder without {SEARCH}", "the folder of a search", "Look below the storage folder.")
    _check_free(overrides)
    check_goes_on(home)
    with mirrored(own, home):
        pass  # what a driver elsewhere wrote is here now
    where["storage"], _, name = home.root.rpartition("/")
    return _run(lambda: search_plan(own / SEARCH, overrides, where, name), where, display or Display())


FREE = ("search.trials", "search.tokens", "search.seconds", "search.concurrent", "search.baseline")
"""Settings that a search may go on with another value of."""


def _check_free(overrides: Sequence[str]) -> None:
    for override in overrides:
        if override.partition("=")[0].strip() not in FREE:
            do = "Leave it as it was, or start a new search."
            raise Refusal(f"--resume: {override}", "a setting that trials depend on", f"one of {', '.join(FREE)}", do)


def cluster_content(cluster: Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """What a `ray_config.yaml` says, for every trial to be told the same."""
    if cluster is None:
        return {}
    content = read_content(cluster)
    if isinstance(cluster, Path):
        load_cluster(cluster)
    return content


def _run(planned: Callable[[], SearchPlan], cluster: Mapping[str, Any], display: Display) -> SearchResult:
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    plan = planned_with_ray(load_cluster(cluster), planned, display)
    display.plan(search_text(plan))
    tell_of_room("The search", plan.held, display)
    with mirrored(plan.folder, plan.spec.home_folder):
        return _drive(plan, display)


def _drive(plan: SearchPlan, display: Display) -> SearchResult:
    plan.folder.mkdir(parents=True, exist_ok=True)
    content = to_yaml({**plan.spec.content, "search": plan.config.model_dump(mode="json", exclude_defaults=True)})
    (plan.folder / SEARCH).write_text(content, encoding="utf-8")
    if plan.spec.home_folder.local is None:  # not some seconds later: without it nobody goes on
        plan.spec.home_folder.child(COPY).write(SEARCH, content.encode())
    tracker, guard = _start_tracking(plan), watchdog.start(plan.folder, beside=f"{plan.name}-*")
    try:
        return _search(going_on(plan, tracker.run_id), tracker, display)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED")
        raise
    finally:
        watchdog.release(guard)


def _search(plan: SearchPlan, tracker: Tracker, display: Display) -> SearchResult:
    spent = _fill(plan, display)
    book, began = Book(plan.folder), time.monotonic()
    board = Leaderboard(plan.config.objective, list(plan.config.space))

    def tell(trial: Trial) -> None:
        board.tell(trial, book.trials())
        _log(tracker, plan, book, trial)

    court = Court(plan.config, plan.spec, book, tell, plan.has_control, plan.first_evaluation)
    with board.shown(), interruptible(display, court.interrupt), pools(plan.name, plan.pooled):
        _tune(plan, court)
    _settle(court)
    tracker.log_text((plan.folder / TRIALS).read_text(encoding="utf-8"), TRIALS)
    if court.interrupted:
        spent.plus((), time.monotonic() - began).save(plan.folder)
        raise Interrupted(f"stopped; trials that had begun are kept. To go on: distill search --resume {plan.folder}")
    spent = spent.plus((), time.monotonic() - began).save(plan.folder)
    result = _conclude(plan, court, tracker, spent)
    tracker.finish("FINISHED")
    return result


def _start_tracking(plan: SearchPlan) -> Tracker:
    reconcile_all(plan.folder.parent)
    known = RunRecord.load(plan.folder)
    cluster = plan.plan.job.cluster
    tracker = Tracker.start(
        uri=of_record(known.uri if known else None, cluster.tracking_uri),
        experiment=cluster.mlflow.experiment,
        name=plan.name,
        folder=plan.folder,
        params={"search": plan.config.model_dump(mode="json", exclude_defaults=True)},
        tags={**plan.tags, "kind": "search"},
        run_id=known.run_id if known else None,
    )
    tracker.log_text((plan.folder / SEARCH).read_text(encoding="utf-8"), SEARCH)
    tracker.log_text(search_text(plan), "plan.txt")
    return tracker


def _fill(plan: SearchPlan, display: Display) -> Spent:
    """Fills what all trials read, text and signals, once. What fails here leaves the parts that are there."""
    spent = Spent.load(plan.folder)
    took: dict[str, Filled] = {}
    for run in plan.shared:
        again, written = with_texts(run, lambda job: make_plan(job, plan.name), display)
        took |= written
        took |= {root: fill(each, display) for each in again.captures() if (root := each.files.folder.root) not in took}
    return spent.plus(took.values()).save(plan.folder)


def _tune(plan: SearchPlan, court: Court) -> None:
    """Runs the trials to their ends. Tune works in a thread of its own, so that a person's Ctrl-C is ours."""
    judge = Judge(court)
    function = tune.with_resources(tune.with_parameters(run_trial, spec=plan.spec), _beside_the_search())
    tuner = tune.Tuner(
        function,
        tune_config=tune.TuneConfig(
            search_alg=Proposals(court, judge.halving),
            scheduler=judge,
            num_samples=-1,
            max_concurrent_trials=plan.config.concurrent,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(name=f"tune-{time.time_ns()}", storage_path=str(plan.folder), verbose=0),
    )
    fitted: Future[Any] = Future()
    threading.Thread(target=_fit, args=(tuner, fitted), name="tune", daemon=True).start()
    while not wait([fitted], POLL_SECONDS).done:
        if court.interrupted:
            court.interrupt()  # again: a trial that was starting could not hear it
    fitted.result()


def _beside_the_search() -> dict[str, float]:
    """Where the process that drives a trial goes: a trial's small files lie where the search's do. It waits, and asks for no CPUs, for
    that may be a head node that lends none; how many there are at once is for `search.concurrent` to say."""
    return {"cpu": 0, f"node:{ray.util.get_node_ip_address()}": 0.001}


def _fit(tuner: tune.Tuner, fitted: Future[Any]) -> None:
    try:
        fitted.set_result(tuner.fit())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the result is asked for
        fitted.set_exception(error)


def _trial_name(trial: Any) -> str:
    return f"{int(trial.config['number']):03d}-{trial.trial_id}"


def _log(tracker: Tracker, plan: SearchPlan, book: Book, trial: Trial) -> None:
    """What a trial's end means to the search, as metrics of the parent by number of ends so far, pauses included."""
    if trial.outcome == "running" or trial.number == CONTROL:
        return
    best = ranked(book.trials(), plan.config.objective[0])
    names = [o.metric for o in plan.config.objective]
    values = {f"trial/{n}": trial.metrics[n] for n in names if n in trial.metrics}
    values |= {f"best/{n}": best[0].metrics[n] for n in names if best and n in best[0].metrics}
    tokens = sum(t.metrics.get("tokens", 0.0) for t in book.trials())
    tracker.log([MetricRow(book.ends, 1, {**values, "tokens": tokens}, time.time())])


def _settle(court: Court) -> None:
    """Every trial's MLflow run has an end: of one whose process died, its watchdog may be about to write it."""
    deadline = time.monotonic() + SETTLE_SECONDS
    folders = [small_files(court.run(t.number, g)) for t in court.book.trials() for g in range(t.generation + 1)]
    while [f for f in folders if reconcile(f) in ("running", "waiting")] and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _conclude(plan: SearchPlan, court: Court, tracker: Tracker, spent: Spent) -> SearchResult:
    """The best recipe, the report, and what is said at the end."""
    trials, objectives = court.book.trials(), plan.config.objective
    best = ranked(trials, objectives[0])
    if not best:
        words = "; ".join(f"trial {t.label} {t.outcome}: {t.words}" for t in trials) or "none began"
        more = f" To go on: distill search --resume {plan.folder}, with a larger budget." if court.spent() else ""
        raise RunFailed(f"no trial of {plan.name} finished ({words}). Their runs are kept beside {plan.folder}.{more}")
    recipe = to_yaml(plan.spec.recipe(best[0].settings))
    (plan.folder / BEST).write_text(recipe, encoding="utf-8")
    report = write_report(plan, court, spent)
    for name in (BEST, REPORT):
        tracker.log_text((plan.folder / name).read_text(encoding="utf-8"), name)
    for picture in sorted(plan.folder.glob("*.png")):
        tracker.log_file(picture)
    return SearchResult(
        name=plan.name,
        folder=str(plan.folder),
        objectives=objectives,
        paths=tuple(plan.config.space),
        trials=tuple(trials),
        best=best[0],
        front=tuple(front(trials, objectives)),
        best_recipe=str(plan.folder / BEST),
        report=str(report),
        mlflow_run_id=tracker.run_id,
        page=tracker.page,
        spent=spent,
    )
