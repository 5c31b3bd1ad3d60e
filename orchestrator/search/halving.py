"""Asynchronous successive halving (arXiv:1810.05934, algorithm 2): who pauses at a rung, and who goes on from one.

Ray Tune's scheduler of that name stops trials, which lets every trial on that is better than those before it: with few at once, most of a
search trains to its end. The paper's pauses all but the best share, and a paused trial goes on when it has become one of these. Here a
pause is an interrupted run, whose checkpoint it goes on from.
"""

from __future__ import annotations

from orchestrator.search.book import CONTROL
from orchestrator.search.court import Court


class Halving:
    """The rungs of one search: the first is at `first_steps`, each later one at `reduction` times as many steps."""

    def __init__(self, court: Court):
        self._court = court
        self._values: list[dict[int, float]] = []
        """Of every rung: the first objective of the trials that came to it, by number; smaller is better."""
        for trial in court.book.trials():
            if trial.number != CONTROL:
                for step, value in court.curve(trial.number).items():
                    self.hear(trial.number, step, value)

    def __deepcopy__(self, memory: dict[int, object]) -> Halving:
        """Tune copies what it is given, and who judges and who proposes have to see the same."""
        return self

    def hear(self, number: int, step: int, value: float) -> bool:
        """A trial was measured; whether it came to a rung with that, and is not among those that go on from there."""
        before = self._rung(number)
        while step >= self._steps(rung := self._rung(number) + 1):
            self._values += [{}] * (rung == len(self._values))
            self._values[rung][number] = value * self._court.config.objective[0].sign
        return self._rung(number) > before and number not in self._best(self._rung(number))

    def next(self) -> int | None:
        """The paused trial that goes on, from the highest rung that has one."""
        rungs = reversed(range(len(self._values)))
        return next((number for rung in rungs for number in self._awaited(rung)), None)

    def _steps(self, rung: int) -> float:
        told = self._court.config.scheduler
        return float((told.first_steps or self._court.first_evaluation) * told.reduction**rung)

    def _rung(self, number: int) -> int:
        """The highest that a trial came to; -1 before the first."""
        return max((rung for rung, values in enumerate(self._values) if number in values), default=-1)

    def _best(self, rung: int) -> list[int]:
        """Who goes on from a rung, the best first: one in `reduction` of those that came. When nobody comes any more it is one at least, so
        that some trial trains to its end."""
        lost = {t.number for t in self._court.book.trials() if t.outcome == "failed"}
        here = {number: value for number, value in self._values[rung].items() if number not in lost}
        share = int(len(here) / self._court.config.scheduler.reduction)
        return sorted(here, key=lambda number: (here[number], number))[: share if self._expects(rung) else max(1, share)]

    def _expects(self, rung: int) -> bool:
        """Whether more trials may come to a rung."""
        running = (t.number for t in self._court.book.trials() if t.outcome == "running" and t.number != CONTROL)
        on_their_way = any(self._rung(number) < rung for number in running)
        return self._court.to_propose or on_their_way or any(self._awaited(lower) for lower in range(rung))

    def _awaited(self, rung: int) -> list[int]:
        """Paused at a rung, and by now among those that go on from there; the best first."""
        paused = {t.number for t in self._court.book.trials() if t.outcome == "paused" and self._rung(t.number) == rung}
        return [number for number in self._best(rung) if number in paused]
