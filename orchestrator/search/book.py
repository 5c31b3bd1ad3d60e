"""What a search has tried, in its folder: every proposal and every end, so that a killed search goes on and repeats nothing.

`trials.jsonl` is the truth; what Ray Tune keeps of its own is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.journal import Journal, Lines
from orchestrator.search.lineage import Legs, grown, schedules
from orchestrator.search.settings import Objective
from orchestrator.search.space import Point

Outcome = Literal["running", "paused", "finished", "stopped", "failed"]
"""`paused`: stopped at a rung of successive halving, where it may go on."""
EARLY: tuple[Outcome, ...] = ("paused", "stopped")
"""Ends before the last step."""
TRIALS = "trials.jsonl"
SEARCH = "search.yaml"
"""A search's recipe as it is written, in its folder: what going on with it needs."""
CONTROL = -1
"""Number of the trial without a teacher."""


@dataclass(frozen=True)
class Move:
    """A trial of a population goes on from another one's checkpoint, with values of its own."""

    number: int
    source: int
    """The trial whose weights and optimizer it takes over."""
    checkpoint: str
    """The folder of the other's checkpoint, which is not copied and must not be deleted while the trial may begin with it."""
    point: Point
    """Values from there on."""


@dataclass(frozen=True)
class Restart:
    """Where a trial went on from another one's checkpoint."""

    step: int
    """Finished steps of that checkpoint."""
    source: int
    checkpoint: str


@dataclass(frozen=True)
class Trial:
    """One trial as far as it has come."""

    number: int
    point: Point
    """Values that it began with, or goes on with since its latest restart."""
    outcome: Outcome = "running"
    step: int = 0
    """Optimizer steps at the latest metrics."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Held-out metrics, and what it has cost: `tokens`, `seconds`, `parameters`."""
    words: str = ""
    """Why it was paused or stopped, or failed."""
    wall_seconds: float = 0.0
    """From its starts to its ends, loading included."""
    restarts: tuple[Restart, ...] = ()
    """Of a population: each is a run of its own, and only the latest one counts."""
    legs: Legs = ()
    """Of a trial that restarted: values by step of all that its weights have been through."""

    @property
    def generation(self) -> int:
        """Which of its runs counts."""
        return len(self.restarts)

    @property
    def settings(self) -> Point:
        """The values of one run that does what this trial did, changes in mid-run as schedules."""
        return schedules(self.legs) if self.legs else self.point

    @property
    def label(self) -> str:
        return "without teacher" if self.number == CONTROL else f"{self.number:03d}"

    def scores(self, objectives: tuple[Objective, ...]) -> tuple[float, ...] | None:
        """Values of the objectives, smaller is better; None when one is missing."""
        found = [self.metrics.get(o.metric) for o in objectives]
        values = tuple(v * o.sign for v, o in zip(found, objectives, strict=True) if v is not None and math.isfinite(v))
        return values if len(values) == len(objectives) else None


def run_name(search: str, number: int, generation: int = 0) -> str:
    """Name of a trial's own run, one for each of its restarts."""
    again = f"-g{generation}" if generation else ""
    return f"{search}-control" if number == CONTROL else f"{search}-{number:03d}{again}"


def run_names(search: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that a trial's runs may have."""
    own = re.compile(rf"{re.escape(search)}-(control|\d{{3,}}(-g\d+)?)")
    return [name for name in names if own.fullmatch(name)]


def ranked(trials: list[Trial], objective: Objective) -> list[Trial]:
    """Finished trials of the space, the best first."""
    scored = [(s[0], t.number, t) for t in trials if t.outcome == "finished" and t.number != CONTROL and (s := t.scores((objective,)))]
    return [trial for _, _, trial in sorted(scored, key=lambda s: s[:2])]


def abreast(trials: list[Trial], curve: Callable[[int], Mapping[int, float]], objective: Objective) -> tuple[list[Trial], int]:
    """Trials of the space that did not fail, as if all had ended where the least of them did: with the objective at the latest step at
    which each was measured, and that step. Where none ended early they are as they finished."""
    done = [t for t in trials if t.outcome == "finished" and t.number != CONTROL]
    early = [t for t in trials if t.outcome in EARLY and t.number != CONTROL]
    curves = {t.number: found for t in (*done, *early) if early and (found := curve(t.number))}
    steps = set.intersection(*map(set, curves.values())) if curves else set()
    if not steps:
        return done, max((t.step for t in done), default=0)
    step = max(steps)
    return [
        replace(t, outcome="finished", step=step, metrics={**t.metrics, objective.metric: curves[t.number][step]})
        for t in sorted((*done, *early), key=lambda t: t.number)
        if t.number in curves
    ], step


def front(trials: list[Trial], objectives: tuple[Objective, ...]) -> list[Trial]:
    """Finished trials that no other is at least as good as in everything and better than in something (Pareto)."""
    scored = [(s, t) for t in ranked(trials, objectives[0]) if (s := t.scores(objectives)) is not None]
    return [t for s, t in scored if not any(_beats(other, s) for other, _ in scored)]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


class Book:
    """Trials of one search, each event written before it is acted on."""

    def __init__(self, folder: Path):
        self._lines = Lines(folder / TRIALS)
        self._trials: dict[int, Trial] = {}
        self.compared_step = 0
        """Finished steps at which a population was last compared."""
        self.ends = 0
        """How often a trial ended, pauses included."""
        for event in self._lines.all():
            self._take(event)

    def propose(self, number: int, point: Point) -> None:
        self._write({"event": "proposed", "number": number, "point": point})

    def end(self, trial: Trial) -> None:
        kept = {key: value for key, value in vars(trial).items() if key not in ("point", "restarts", "legs")}
        self._write({"event": "ended", **kept, "metrics": {k: v for k, v in trial.metrics.items() if math.isfinite(v)}})

    def go_on(self, number: int) -> None:
        """A paused trial trains on."""
        self._write({"event": "resumed", "number": number, "outcome": "running", "words": ""})

    def compare(self, step: int, moves: Sequence[Move]) -> None:
        """A population was compared after `step` steps; whoever is in `moves` restarts."""
        self._write({"event": "compared", "step": step, "moves": [vars(move) for move in moves]})

    def heard(self, trial: Trial) -> None:
        """What a running trial has reached; its own journal keeps it."""
        self._trials[trial.number] = trial

    def trials(self) -> list[Trial]:
        """In order of number."""
        return [self._trials[number] for number in sorted(self._trials)]

    def get(self, number: int) -> Trial | None:
        return self._trials.get(number)

    def _write(self, event: Mapping[str, Any]) -> None:
        self._lines.append([event])
        self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "compared":
            self._take_moves(event["step"], [Move(**move) for move in event["moves"]])
            return
        self.ends += event["event"] == "ended"
        told = {key: value for key, value in event.items() if key != "event"}
        number = event["number"]
        self._trials[number] = replace(self._trials[number], **told) if number in self._trials else Trial(**told)

    def _take_moves(self, step: int, moves: Sequence[Move]) -> None:
        self.compared_step, before = step, dict(self._trials)
        for move in moves:
            trial, source = before[move.number], before[move.source]
            legs = grown(source.legs or ((0, source.point),), step, move.point)
            restarts = (*trial.restarts, Restart(step, move.source, move.checkpoint))
            self._trials[move.number] = replace(trial, point=move.point, step=step, restarts=restarts, legs=legs)


def curve(folder: Path, metric: str) -> dict[int, float]:
    """A metric of a run by step, from its journal, where it was a number."""
    return {row.step: row.values[metric] for row in Journal(folder).rows() if math.isfinite(row.values.get(metric, math.nan))}
