"""Who may go on, as Ray Tune asks it.

The verdicts are those of Tune's own schedulers (ASHA, median). They reach a trial through its run's board, because a trial that Tune ends
itself is killed: its MLflow run would stay open, and its workers would hold their resources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.errors import origin
from orchestrator.search.book import CONTROL, Trial
from orchestrator.search.court import Court
from orchestrator.search.population import Population
from orchestrator.search.settings import COSTS, SearchConfig
from orchestrator.search.trial import CHECKPOINT, GENERATION, OUTCOME, TIME

NO_LAST_STEP = 10**9
"""ASHA would end trials at its own last step; a run's last step ends it here."""


class Judge(FIFOScheduler):
    """Writes down what trials report and, on a verdict of the scheduler inside, asks them to end."""

    def __init__(self, court: Court):
        super().__init__()
        self._court = court
        self._inner = _scheduler(court)
        self._population = Population(court, court.spec.every_steps) if court.spec.every_steps else None
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
        if known is not None and known.outcome == "running" and result.get(GENERATION, 0) == known.generation:
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
        stopped = result[OUTCOME] == "stopped"
        if stopped and self._court.interrupted and trial.number not in self._why:
            return
        given = str(result.get("words", ""))
        words = self._why.get(trial.number, given) if stopped else given  # a verdict may come after the last step
        ended = replace(trial, outcome=result[OUTCOME], words=words, wall_seconds=float(result.get("wall_seconds", 0.0)))
        self._court.book.end(ended)
        self._court.tell(ended)
        if self._population is not None:
            self._population.settle()

    def _judge(self, tune_controller: Any, trial: Any, heard: Trial, result: dict[str, Any]) -> None:
        if heard.number in self._why or heard.number == CONTROL:
            return
        if self._court.interrupted:
            self._court.stop(heard.number, heard.generation)
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
            self._court.stop(heard.number, heard.generation)
        elif self._population is not None and CHECKPOINT in result:
            self._population.hear(heard.number, heard.step, heard.metrics[self._court.config.objective[0].metric], result[CHECKPOINT])


def _has(result: Mapping[str, Any], config: SearchConfig) -> bool:
    return math.isfinite(result.get(config.objective[0].metric, math.nan))


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a report, without what Tune and this module add."""
    return {k: float(v) for k, v in result.items() if (k.startswith("eval/") or k in COSTS) and isinstance(v, int | float)}


def _scheduler(court: Court) -> TrialScheduler | None:
    return _SCHEDULERS[court.config.scheduler.type](court)


def _asha(court: Court) -> TrialScheduler:
    told, objective = court.config.scheduler, court.config.objective[0]
    return ASHAScheduler(
        time_attr=TIME,
        metric=objective.metric,
        mode=objective.direction,
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
        mode=objective.direction,
        grace_period=told.first_steps or court.first_evaluation,
        min_samples_required=told.min_trials,
        min_time_slice=math.inf,  # never pauses: a paused trial would hold what the next one needs
    )


def _nobody(court: Court) -> None:
    """Who stops no trial: a population restarts them instead."""


_SCHEDULERS: Mapping[str, Callable[[Court], TrialScheduler | None]] = {"none": _nobody, "asha": _asha, "median": _median, "pbt": _nobody}


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
