"""A training worker's side of the strategy's controllers: what they hear, what they remember, and what they said to whom.

Every rank holds the same, because metrics are sums over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategies.control import CONTROL, Controller, values_by_name
from strategies.core import Progress


class Controls:
    """The controllers of one run."""

    def __init__(self, controllers: Mapping[str, Controller], kept: Mapping[str, Any], versions: int):
        """Goes on with what a checkpoint `kept`, nothing for a run that begins. Remembers the values of so many student versions."""
        states = kept.get("states", {})
        self._controllers, self._most = controllers, versions
        self._states = {name: states.get(name, c.begin()) for name, c in controllers.items()}
        self.versions: dict[int, dict[str, float]] = {int(step): values for step, values in kept.get("versions", {}).items()}
        """Values by the finished steps of the student that they went out with."""

    @property
    def values(self) -> dict[str, float]:
        """Of the next step."""
        return values_by_name(self._states, self._controllers)

    @property
    def metrics(self) -> dict[str, float]:
        """The same, as they are logged."""
        return {CONTROL + name: value for name, value in self.values.items()}

    def after_step(self, metrics: Mapping[str, float], progress: Progress) -> None:
        """Tells them of the step at `progress`, unless it was skipped, as what is not finite would stay with them for ever, or taught
        nothing: its losses are no losses."""
        if not metrics["skipped"] and metrics.get("micro_batches", 1.0):
            self._states = {name: c.after_step(self._states[name], metrics, progress) for name, c in self._controllers.items()}

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Tells them of an evaluation."""
        self._states = {name: c.after_evaluation(self._states[name], metrics) for name, c in self._controllers.items()}

    def send_with(self, step: int) -> None:
        """Their values go out with the student after `step` steps, and stay what they were then."""
        self.versions.setdefault(step, self.values)
        for old in sorted(self.versions)[: -self._most]:
            del self.versions[old]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing where nobody listens."""
        kept = {"states": {n: dict(s) for n, s in self._states.items()}, "versions": {str(s): v for s, v in self.versions.items()}}
        return kept if self._controllers else {}
