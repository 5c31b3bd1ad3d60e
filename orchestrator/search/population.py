"""Population-based training (arXiv:1711.09846): who goes on from whose checkpoint, and with what values.

The answers are those of Ray Tune's own scheduler, which is shown trials that have all reached the same step. What it takes for checkpoints
are pointers: they name folders in the storage, and what they name is kept for as long as a trial may begin with it. Trials are not
paused: one that is replaced trains on until the news reaches it, and what it did meanwhile is not used.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pydantic import JsonValue
from ray.tune.schedulers import PopulationBasedTraining

from orchestrator import checkpoint
from orchestrator.search.book import CONTROL, Move, Trial
from orchestrator.search.court import Court
from orchestrator.search.settings import Domain, SearchConfig
from orchestrator.search.space import Point
from orchestrator.search.trial import TIME


@dataclass(frozen=True)
class Pointer:
    """A checkpoint, as Tune's scheduler has it in its hands."""

    number: int
    """The trial whose checkpoint it is."""
    folder: str


@dataclass(eq=False)
class Member:
    """A trial at a comparison, as Tune's scheduler sees trials."""

    pointer: Pointer
    value: float
    """The first objective."""
    config: Point
    experiment_tag: str = ""
    status: str = "RUNNING"
    run_metadata: Any = field(
        default_factory=lambda: SimpleNamespace(checkpoint_manager=SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None)))
    )

    @property
    def trial_id(self) -> str:
        return str(self.pointer.number)

    def is_finished(self) -> bool:
        """Never: one that has ended since was at this step, too, and others may go on from there."""
        return False

    def set_config(self, config: Point) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag


@dataclass
class _Controller:
    """What Tune's scheduler asks of Tune; whom it pauses, it has given another's checkpoint."""

    members: Sequence[Member]
    replaced: list[Member] = field(default_factory=list)
    search_alg: None = None

    def get_trials(self) -> list[Member]:
        return list(self.members)

    get_live_trials = get_trials

    def _schedule_trial_save(self, trial: Member, result: Mapping[str, Any]) -> Pointer:
        return trial.pointer

    def pause_trial(self, trial: Member, should_checkpoint: bool) -> None:
        self.replaced.append(trial)


def moves(config: SearchConfig, step: int, members: Sequence[Member]) -> list[Move]:
    """What becomes of trials that are compared after `step` steps; a function of its arguments and the search's seed."""
    told, objective = config.scheduler, config.objective[0]
    with _seeded(f"{config.seed}/{step}"):
        scheduler = PopulationBasedTraining(
            time_attr=TIME,
            metric=objective.metric,
            mode=objective.direction,
            perturbation_interval=step,
            hyperparam_mutations={path: _drawn(domain) for path, domain in config.space.items()},
            quantile_fraction=told.quantile,
            resample_probability=told.resample,
            custom_explore_fn=lambda point: {path: _inside(config.space[path], value) for path, value in point.items()},
            log_config=False,
            synch=True,
        )
        controller = _Controller(members)
        for member in members:
            scheduler.on_trial_add(controller, member)
        for member in members:
            scheduler.on_trial_result(controller, member, {TIME: step, objective.metric: member.value})
    taken = [(m, m.run_metadata.checkpoint_manager._latest_checkpoint_result.checkpoint) for m in controller.replaced]
    return [Move(m.pointer.number, pointer.number, pointer.folder, m.config) for m, pointer in taken]


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Tune's scheduler draws from Python's own generator."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def _drawn(domain: Domain) -> list[JsonValue] | Callable[[], float]:
    """How Tune's scheduler draws a value anew, and which are neighbours."""
    if domain.choice is not None:
        return list(domain.choice)
    low, high = domain.bounds
    if domain.integer is not None:
        return lambda: random.randint(int(low), int(high))
    if domain.log_uniform is not None:
        return lambda: math.exp(random.uniform(math.log(low), math.log(high)))
    return lambda: random.uniform(low, high)


def _inside(domain: Domain, value: Any) -> JsonValue:
    """The nearest value of the domain: what is multiplied may leave it."""
    if domain.choice is not None:
        return value  # type: ignore[no-any-return]
    low, high = domain.bounds
    inside = min(max(value, low), high)
    return round(inside) if domain.integer is not None else float(inside)


@dataclass(frozen=True)
class _Report:
    value: float
    folder: str


class Population:
    """The trials of one search by the comparisons they have come to. Every comparison is in the book before anybody hears of it."""

    def __init__(self, court: Court, every_steps: int):
        self._court, self._every = court, every_steps
        logging.getLogger(PopulationBasedTraining.__module__).setLevel(logging.WARNING)  # whoever looks on sees the leaderboard
        self._reports: dict[int, dict[int, _Report]] = {}
        for trial in court.book.trials():
            self._recall(trial)

    def _recall(self, trial: Trial) -> None:
        """What a trial of an earlier driver has reached: its journal says how good it was, and its folder what is kept."""
        run = self._court.run(trial.number)
        for step, value in self._court.curve(trial.number).items():
            found = checkpoint.at(run, step) if step % self._every == 0 else None
            if found is not None:
                self._note(trial.number, step, _Report(value, found.root))

    def _note(self, number: int, step: int, report: _Report) -> None:
        self._reports.setdefault(number, {})[step] = report

    def hear(self, number: int, step: int, value: float, folder: str) -> None:
        """A trial has a checkpoint after `step` steps, where it had reached `value`."""
        self._note(number, step, _Report(value, folder))
        self.settle()

    def settle(self) -> None:
        """Compares whoever is to be compared, as often as everybody is there."""
        while (members := self._gathered(self._court.book.compared_step + self._every)) is not None:
            self._compare(self._court.book.compared_step + self._every, members)

    def _gathered(self, step: int) -> list[Member] | None:
        """Everybody who came to `step`; None while somebody is still to come, or nobody came."""
        court = self._court
        trials = [t for t in court.book.trials() if t.number != CONTROL]
        here = {t.number: self._reports[t.number][step] for t in trials if step in self._reports.get(t.number, {})}
        late = [t for t in trials if t.outcome == "running" and t.number not in here]
        if late or not here or court.to_propose:
            return None
        return [Member(Pointer(t.number, here[t.number].folder), here[t.number].value, t.point) for t in trials if t.number in here]

    def _compare(self, step: int, members: Sequence[Member]) -> None:
        court = self._court
        before = {t.number: t for t in court.book.trials()}
        found = [move for move in moves(court.config, step, members) if before[move.number].outcome == "running"]
        court.book.compare(step, found)
        for move in found:
            self._reports.pop(move.number, None)
            court.stop(move.number, before[move.number].generation)
        self._release(step)

    def _release(self, step: int) -> None:
        """Gives up checkpoints from before a comparison that no trial begins with, goes on from, or may be found to be its best."""
        trials = [t for t in self._court.book.trials() if t.number != CONTROL]
        pinned = {t.restarts[-1].checkpoint for t in trials if t.restarts and t.outcome == "running"}
        for trial in trials:
            for generation in range(trial.generation + 1):
                try:
                    self._give_up(trial, generation, step, pinned)
                except (json.JSONDecodeError, FileNotFoundError):  # Ray is just writing down what there is; the next comparison is soon
                    continue

    def _give_up(self, trial: Trial, generation: int, step: int, pinned: set[str]) -> None:
        run, wanted = self._court.run(trial.number, generation), set(pinned)
        if generation == trial.generation:
            metric = self._court.spec.job(trial.settings).run.checkpoint.best_metric
            wanted |= {f.root for f in (checkpoint.committed(run), checkpoint.best(run, metric)) if f is not None}
        for found in checkpoint.kept(run):
            if found.root not in wanted and checkpoint.read_position(found).step < step:
                checkpoint.release(found)
