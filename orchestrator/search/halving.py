"""Asynchronous successive halving (arXiv:1810.05934, algorithm 2): who pauses at a rung, and who goes on from one.

Ray Tune's scheduler of that name stops trials, which lets every trial on that is better than those before it: with few at once, most of a
search trains to its end. The paper's pauses all but the best share, and a paused trial goes on when it has become one of these. Here a
pause is an interrupted run, whose checkpoint it goes on from.
"""

from __future__ import annotations

from orchestrator.search.book import CONTROL
from orchestrator.search.court import Court


class Halving:
    """The rungs of one search, from 0 on; a trial that has not come to the first is at -1."""

    def __init__(self, court: Court):
        self._court = court
        self._values: list[dict[int, float]] = []
        """Of every rung: the first objective of the trials that came to it, by number; smaller is better."""
        self._left: dict[int, int] = {}
        """The rung that a trial was last let on from, which nothing takes back."""
        for trial in court.book.trials():
            if trial.number == CONTROL:
                continue
            for step, value in court.curve(trial.number).items():
                if trial.outcome != "finished" or step < trial.step:
                    self._note(trial.number, step, value)
            if trial.step >= self._steps(self._rung(trial.number)):
                self._left[trial.number] = self._rung(trial.number)

    def hear(self, number: int, step: int, value: float) -> bool:
        """A trial under way was measured; whether it has to pause at the rung to which it came."""
        self._note(number, step, value)
        rung = self._rung(number)
        if self._left.get(number, -1) < rung and number in self._going_on()[rung]:
            self._left[number] = rung
        return self._left.get(number, -1) < rung

    def next(self) -> int | None:
        """The paused trial that goes on, from the highest rung that has one, or on its way to the first."""
        paused = self._at("paused")
        for rung, going in reversed(self._going_on().items()):
            for number in going:
                if paused.get(number) == rung:
                    self._left[number] = rung
                    return number
        return None

    def _note(self, number: int, step: int, value: float) -> None:
        while step >= self._steps(rung := self._rung(number) + 1):
            self._values += [{}] * (rung == len(self._values))
            self._values[rung][number] = value * self._court.config.objective[0].sign

    def _steps(self, rung: int) -> int:
        return self._court.config.scheduler.rung_steps(rung, self._court.first_evaluation)

    def _rung(self, number: int) -> int:
        """The highest that a trial came to."""
        return max((rung for rung, values in enumerate(self._values) if number in values), default=-1)

    def _at(self, outcome: str) -> dict[int, int]:
        """Trials of that outcome, and their rungs."""
        return {t.number: self._rung(t.number) for t in self._court.book.trials() if t.outcome == outcome and t.number != CONTROL}

    def _going_on(self) -> dict[int, list[int]]:
        """Who goes on from each rung, the best first: one in `reduction` of those that came and have not failed or been stopped. Where
        nobody comes any more it is one at least, so that some trial trains to its end."""
        paused, running = self._at("paused"), self._at("running")
        lost = self._at("failed") | self._at("stopped")
        coming = self._court.to_propose
        found = {-1: [number for number, rung in paused.items() if rung == -1]}
        for rung, values in enumerate(self._values):
            coming |= min(running.values(), default=rung) < rung
            coming |= any(paused.get(number) == rung - 1 for number in found[rung - 1])
            here = sorted((value, number) for number, value in values.items() if number not in lost)
            share = int(len(here) / self._court.config.scheduler.reduction)
            found[rung] = [number for _, number in here[: share if coming else max(1, share)]]
        return found
