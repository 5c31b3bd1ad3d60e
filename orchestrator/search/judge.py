"""Who may go on, as Ray Tune asks it.

Verdicts reach a trial through its run's board, because a trial that Tune ends itself is killed: its MLflow run would stay open, and its
workers would hold their resources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.errors import origin
from orchestrator.search.book import CONTROL, Outcome, Trial
from orchestrator.search.court import Court
from orchestrator.search.halving import Halving
from orchestrator.search.population import Population
from orchestrator.search.settings import COSTS, SearchConfig
from orchestrator.search.trial import CHECKPOINT, GENERATION, OUTCOME, TIME


@dataclass(frozen=True)
class Verdict:
    """Why a trial was asked to end, and what that makes of it."""

    words: str
    outcome: Outcome = "stopped"


class Judge(FIFOScheduler):
    """Writes down what trials report and, on a verdict of the scheduler inside, asks them to end."""

    def __init__(self, court: Court):
        super().__init__()
        self._court = court
        self._inner = _median(court) if court.config.scheduler.type == "median" else None
        self.halving = Halving(court) if court.config.scheduler.type == "asha" else None
        self._population = Population(court, court.spec.every_steps) if court.spec.every_steps else None
        self._why: dict[int, Verdict] = {}
        """By the numbers of those that were asked to end, paused ones until they have."""
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
            heard = replace(known, step=max(known.step, int(result[TIME])), metrics={**known.metrics, **_numbers(result)})
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
        verdict = self._why.get(trial.number)
        if verdict is not None and verdict.outcome == "paused":
            del self._why[trial.number]  # it may go on, and be judged anew
        outcome, words = result[OUTCOME], str(result.get("words", ""))
        if outcome == "stopped":  # a verdict may come after the last step
            if verdict is None and self._court.interrupted:
                return
            outcome, words = (verdict.outcome, verdict.words) if verdict else (outcome, words)
        ended = replace(trial, outcome=outcome, words=words, wall_seconds=trial.wall_seconds + float(result.get("wall_seconds", 0.0)))
        self._court.book.end(ended)
        self._court.tell(ended)
        if self._population is not None:
            self._population.settle()

    def _judge(self, tune_controller: Any, trial: Any, heard: Trial, result: dict[str, Any]) -> None:
        if heard.number == CONTROL:
            return
        verdict = self._verdict(tune_controller, trial, heard, result)
        if verdict is not None:
            self._why.setdefault(heard.number, verdict)
        if heard.number in self._why or self._court.interrupted:
            self._court.stop(heard.number, heard.generation)  # again, where it has not heard it yet
        elif self._population is not None and CHECKPOINT in result:
            self._population.hear(heard.number, heard.step, heard.metrics[self._court.config.objective[0].metric], result[CHECKPOINT])

    def _verdict(self, tune_controller: Any, trial: Any, heard: Trial, result: dict[str, Any]) -> Verdict | None:
        metric, measured = self._court.config.objective[0].metric, _has(result, self._court.config)
        pauses = self.halving is not None and measured and self.halving.hear(heard.number, heard.step, heard.metrics[metric])
        if spent := self._court.spent():
            return Verdict(spent, "paused" if self.halving is not None else "stopped")
        words = f"{self._court.config.scheduler.type}: {metric} {heard.metrics.get(metric, math.nan):.4f} at step {heard.step}"
        if pauses:
            return Verdict(words, "paused")
        if self._inner is None or not measured or heard.number in self._why:
            return None
        return Verdict(words) if self._inner.on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP else None


def _has(result: Mapping[str, Any], config: SearchConfig) -> bool:
    return math.isfinite(result.get(config.objective[0].metric, math.nan))


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a report, without what Tune and this module add."""
    return {k: float(v) for k, v in result.items() if (k.startswith("eval/") or k in COSTS) and isinstance(v, int | float)}


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
