"""What Ray Tune tries next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from orchestrator.search.book import CONTROL, EARLY, ranked
from orchestrator.search.court import Court
from orchestrator.search.halving import Halving
from orchestrator.search.sampler import propose


class Proposals(Searcher):
    """Points for Tune: first those that had begun or go on after a pause, then new ones, then the control of the best."""

    def __init__(self, court: Court, halving: Halving | None = None):
        super().__init__()
        self._court, self._halving = court, halving
        self._unfinished = [t.number for t in court.book.trials() if t.outcome == "running"]
        self._running: set[str] = set()
        self._control_begun = False

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        court = self._court
        if court.interrupted:
            return str(Searcher.FINISHED)
        proposal = self._again() or self._promoted() or self._new() or self._control()
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
            if number != CONTROL:
                return self._as_it_was(number)
        return None

    def _promoted(self) -> dict[str, Any] | None:
        number = self._halving.next() if self._halving is not None and not self._court.spent() else None
        if number is None:
            return None
        self._court.book.go_on(number)
        return self._as_it_was(number)

    def _as_it_was(self, number: int) -> dict[str, Any]:
        trial = self._court.book.get(number)
        assert trial is not None
        return {"number": number, "point": trial.point}

    def _new(self) -> dict[str, Any] | None:
        court = self._court
        past = [t for t in court.book.trials() if t.number != CONTROL]
        if not court.to_propose:
            return None
        number = len(past)
        told = EARLY if self._halving is None else (*EARLY, "running")  # those that go on are the best there are
        curves = {t.number: court.curve(t.number) for t in past if t.outcome in told}
        point = propose(court.config, court.spec.content, number, past, curves)
        court.book.propose(number, point)
        return {"number": number, "point": point}

    def _control(self) -> dict[str, Any] | None:
        court, known = self._court, self._court.book.get(CONTROL)
        best = ranked(court.book.trials(), court.config.objective[0])
        ended = known is not None and known.outcome != "running"
        if self._running or self._control_begun or ended or not court.wants_control or not best:
            return None
        if not court.spec.taught(best[0].point):
            return None
        self._control_begun = True
        court.book.propose(CONTROL, best[0].settings)
        return {"number": CONTROL, "point": best[0].settings, "of": best[0].number}

    def _waits(self) -> bool:
        """Whether somebody may still begin or go on, once those under way have come further."""
        return bool(self._running) and (self._halving is not None or (self._court.wants_control and not self._control_begun))
