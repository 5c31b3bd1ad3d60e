"""Ray Tune's two questions to a search: what to try next, and who may go on.

The scheduler's verdicts are Tune's own (ASHA, median). They reach a trial through its run's board, because a trial that Tune ends itself
is killed: its MLflow run would stay open and its workers would hold their resources.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.errors import origin
from orchestrator.search.book import CONTROL, Book, Trial, curve, ranked, run_name
from orchestrator.search.sampler import propose
from orchestrator.search.settings import SearchConfig
from orchestrator.search.trial import OUTCOME, TIME, Spec

NO_LAST_STEP = 10**9
"""ASHA would end trials at its own last step; a run's last step ends it here."""


@dataclass(eq=False)
class Court:
    """What proposals and verdicts rest on, in the driver."""

    config: SearchConfig
    spec: Spec
    book: Book
    tell: Callable[[Trial], None]
    """Hears of every trial that has moved."""
    wants_control: bool
    first_evaluation: int
    """Optimizer steps after which a trial is first measured."""
    began: float = 0.0
    interrupted: bool = False
    """A person asked to stop: nothing new begins, and what is under way may go on later."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Tune keeps a copy of all it is given, to go on from; a search goes on from its book, so that there is nothing to copy."""
        return (object, ())

    def __deepcopy__(self, memory: dict[int, object]) -> Court:
        return self

    def spent(self) -> str:
        """Which budget is used up, in words; nothing while none is."""
        tokens = sum(t.metrics.get("tokens", 0.0) for t in self.book.trials() if t.number != CONTROL)
        if self.config.tokens is not None and tokens >= self.config.tokens:
            return f"the search's {self.config.tokens:,} tokens are used up"
        seconds = time.monotonic() - self.began
        if self.config.seconds is not None and seconds >= self.config.seconds:
            return f"the search's {self.config.seconds:,g} seconds are over"
        return ""

    def folder(self, number: int) -> Path:
        return self.spec.folder(number).local or Path("runs") / run_name(self.spec.search, number)

    def curve(self, number: int) -> dict[int, float]:
        """The first objective of a trial, by step."""
        return curve(self.folder(number), self.config.objective[0].metric)

    def stop(self, number: int) -> None:
        """Tells a trial's run to write a checkpoint and end. One that has no board yet, or none any more, cannot hear it."""
        try:
            board = ray.get_actor(f"{run_name(self.spec.search, number)}/board")
        except ValueError:
            return
        board.ask_to_stop.remote()

    def interrupt(self) -> None:
        """Nothing new begins, and every trial under way ends after a checkpoint."""
        self.interrupted = True
        for trial in self.book.trials():
            if trial.outcome == "running":
                self.stop(trial.number)


class Proposals(Searcher):
    """Points for Tune: first those that were begun and have not ended, then new ones, then the control of the best."""

    def __init__(self, court: Court):
        super().__init__()
        self._court = court
        self._unfinished = [t.number for t in court.book.trials() if t.outcome == "running"]
        self._running: set[str] = set()
        self._control_begun = False

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        court = self._court
        if court.interrupted:
            return str(Searcher.FINISHED)
        proposal = self._again() or self._new() or self._control()
        if proposal is None:
            return None if self._waits() else str(Searcher.FINISHED)
        self._running.add(trial_id)
        return proposal

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the book has everything. Tune moves the file."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its book")

    def _again(self) -> dict[str, Any] | None:
        while self._unfinished:
            number = self._unfinished.pop(0)
            trial = self._court.book.get(number)
            if trial is not None and number != CONTROL:
                return {"number": number, "point": trial.point}
        return None

    def _new(self) -> dict[str, Any] | None:
        court = self._court
        past = [t for t in court.book.trials() if t.number != CONTROL]
        if len(past) >= court.config.trials or court.spent():
            return None
        number = len(past)
        curves = {t.number: court.curve(t.number) for t in past if t.outcome == "stopped"}
        point = propose(court.config, court.spec.content, number, past, curves)
        if point is None:
            return None
        court.book.propose(number, point)
        return {"number": number, "point": point}

    def _control(self) -> dict[str, Any] | None:
        court, known = self._court, self._court.book.get(CONTROL)
        best = ranked(court.book.trials(), court.config.objective[0])
        ended = known is not None and known.outcome != "running"
        if self._running or self._control_begun or ended or not court.wants_control or not best:
            return None
        self._control_begun = True
        court.book.propose(CONTROL, best[0].point)
        return {"number": CONTROL, "point": best[0].point, "of": best[0].number}

    def _waits(self) -> bool:
        """Whether a control is still to come, once the others have ended."""
        return bool(self._running) and self._court.wants_control and not self._control_begun


class Judge(FIFOScheduler):
    """Writes down what trials report and, on a verdict of the scheduler inside, asks them to end."""

    def __init__(self, court: Court):
        super().__init__()
        self._court = court
        self._inner = _scheduler(court)
        self._why: dict[int, str] = {}
        """Verdicts, by the numbers of those that were asked to end."""
        if self._inner is not None:
            _replay(self._inner, court)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        if self._inner is not None:
            self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = int(trial.config["number"])
        known = self._court.book.get(number)
        if known is not None and known.outcome == "running":
            heard = replace(known, step=int(result[TIME]), metrics=_numbers(result))
            if OUTCOME in result:
                self._end(heard, result)
            else:
                self._court.book.heard(heard)
                self._court.tell(heard)
                self._judge(tune_controller, trial, heard, result)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        number = int(trial.config["number"])
        if self._inner is not None and number != CONTROL and number not in self._why and _has(result, self._court.config):
            self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        known = self._court.book.get(int(trial.config["number"]))
        if known is not None and known.outcome == "running":
            error = trial.get_pickled_error() or trial.get_error()
            self._end(known, {OUTCOME: "failed", "words": origin(error) if error else "its process died"})

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        return None

    def _end(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Writes a trial's end down. One that a person stopped has not ended: the search goes on with it."""
        if result[OUTCOME] == "stopped" and self._court.interrupted and trial.number not in self._why:
            return
        words = self._why.get(trial.number, str(result.get("words", "")))
        ended = replace(trial, outcome=result[OUTCOME], words=words, wall_seconds=float(result.get("wall_seconds", 0.0)))
        self._court.book.end(ended)
        self._court.tell(ended)

    def _judge(self, tune_controller: Any, trial: Any, heard: Trial, result: dict[str, Any]) -> None:
        if heard.number in self._why or heard.number == CONTROL:
            return
        if self._court.interrupted:
            self._court.stop(heard.number)
            return
        why = self._court.spent()
        if not why and self._inner is not None and _has(result, self._court.config):
            verdict = self._inner.on_trial_result(tune_controller, trial, result)
            metric = self._court.config.objective[0].metric
            value = heard.metrics.get(metric, math.nan)
            stops = verdict == TrialScheduler.STOP
            why = f"{self._court.config.scheduler.type}: {metric} {value:.4f} at step {heard.step}" if stops else ""
        if why:
            self._why[heard.number] = why
            self._court.stop(heard.number)


def _has(result: Mapping[str, Any], config: SearchConfig) -> bool:
    return math.isfinite(result.get(config.objective[0].metric, math.nan))


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a report, without what Tune and this module add."""
    own = ("tokens", "seconds", "parameters")
    return {k: float(v) for k, v in result.items() if (k.startswith("eval/") or k in own) and isinstance(v, int | float)}


def _scheduler(court: Court) -> TrialScheduler | None:
    return _SCHEDULERS[court.config.scheduler.type](court)


def _asha(court: Court) -> TrialScheduler:
    told, objective = court.config.scheduler, court.config.objective[0]
    return ASHAScheduler(
        time_attr=TIME,
        metric=objective.metric,
        mode=objective.mode,
        max_t=NO_LAST_STEP,
        grace_period=told.first_steps or court.first_evaluation,
        reduction_factor=told.reduction,
        stop_last_trials=False,
    )


def _median(court: Court) -> TrialScheduler:
    told, objective = court.config.scheduler, court.config.objective[0]
    return MedianStoppingRule(
        time_attr=TIME,
        metric=objective.metric,
        mode=objective.mode,
        grace_period=told.first_steps or court.first_evaluation,
        min_samples_required=told.min_trials,
        min_time_slice=math.inf,  # never pauses: a paused trial would hold what the next one needs
    )


_SCHEDULERS: Mapping[str, Callable[[Court], TrialScheduler | None]] = {"none": lambda court: None, "asha": _asha, "median": _median}


@dataclass(frozen=True, eq=False)
class _Ended:
    """A trial of an earlier driver, as far as a scheduler wants to know it."""

    trial_id: str


def _replay(scheduler: TrialScheduler, court: Court) -> None:
    """Shows a scheduler what ended trials had reached, so that a search that goes on judges as if it had never stopped."""
    metric = court.config.objective[0].metric
    for trial in court.book.trials():
        if trial.outcome == "running" or trial.number == CONTROL:
            continue
        shown = _Ended(f"ended-{trial.number}")
        scheduler.on_trial_add(None, shown)
        for step, value in court.curve(trial.number).items():
            scheduler.on_trial_result(None, shown, {TIME: step, metric: value})
