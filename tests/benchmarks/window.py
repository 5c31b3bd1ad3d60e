"""Steady state: tokens over wall-clock time between two steps, whatever happens inside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Window:
    """Which steps are measured. The rest of a run fills queues before it, and keeps teachers at work until its end."""

    warm_up: int
    measured: int
    cool_down: int

    @property
    def steps(self) -> int:
        return self.warm_up + self.measured + self.cool_down


@dataclass(frozen=True)
class Trace:
    """What a training run leaves: for each step, from the first on, when it ended and what it saw."""

    times: tuple[float, ...]
    """Unix seconds."""
    tokens: tuple[int, ...]
    """Real tokens, padding left out."""
    losses: tuple[float, ...]

    def tokens_per_second(self, window: Window) -> float:
        """Tokens of the measured steps over the time from the end of the step before them to the end of the last."""
        first, last = window.warm_up, window.warm_up + window.measured
        if len(self.times) != window.steps:
            raise ValueError(f"a trace of {len(self.times)} steps; expected {window.steps}")
        return sum(self.tokens[first:last]) / (self.times[last - 1] - self.times[first - 1])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Trace:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(content["times"]), tuple(content["tokens"]), tuple(content["losses"]))


def first_losses_differ(one: Trace, other: Trace) -> float:
    """Relative difference of the first step's losses: both sides start from the same weights and rows."""
    return float(abs(one.losses[0] - other.losses[0]) / abs(np.float64(other.losses[0])))
