"""Paces: how the share of the rows grows that a step may draw from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import Discriminator, Field, PositiveInt, Tag

from strategies.control import State, Value
from strategies.core import Progress, Settings
from strategies.schedule import Cosine, Ramp, Steps


class Competence(Settings):
    """c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2)): Competence-based Curriculum Learning (arXiv:1903.09848), the square-root pace of its
    section 2. Rows are added ever more slowly, so that each new one has about the same time."""

    competence: Annotated[float, Field(gt=0, le=1)]
    """c0, the share at the first step."""
    over_steps: PositiveInt | None = None
    """T, after which all rows may be drawn; the whole run when absent."""

    def __call__(self, progress: Progress) -> float:
        share = progress.step / (self.over_steps or max(1, progress.steps))
        return min(1.0, math.sqrt(share * (1 - self.competence**2) + self.competence**2))


class StalledShare(Settings):
    """A share that grows whenever a loss has stopped falling: what was learnt from these rows is learnt.

    The loss is smoothed: m <- s m + (1 - s) loss. Where m has not been below the lowest one since the last rise by `least_fall` for
    `patience` times, `rise` is added, up to 1, and the lowest one is forgotten."""

    start: Annotated[float, Field(gt=0, le=1)] = 0.2
    rise: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Added each time."""
    patience: PositiveInt
    """How often the loss is heard without falling: steps of `loss` and `loss/<term>`, evaluations of `eval/...`."""
    least_fall: Annotated[float, Field(ge=0)] = 0.0
    """In the loss's own unit."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """s; 0 takes each loss as it is."""
    metric: Annotated[str, Field(pattern="^(eval/|loss$|loss/)")] = "loss"

    @property
    def hears(self) -> frozenset[str]:
        return frozenset({self.metric})

    def begin(self) -> State:
        return {"share": self.start}

    def after_step(self, state: State, metrics: Mapping[str, float], progress: Progress) -> State:
        return state if self.metric.startswith("eval/") else self._heard(state, metrics[self.metric])

    def after_evaluation(self, state: State, metrics: Mapping[str, float]) -> State:
        return self._heard(state, metrics[self.metric]) if self.metric.startswith("eval/") else state

    def value(self, state: State) -> Value:
        return state["share"]

    def _heard(self, state: State, loss: float) -> State:
        mean = self.smoothing * state.get("mean", loss) + (1 - self.smoothing) * loss
        if mean < state.get("lowest", math.inf) - self.least_fall:
            return {"share": state["share"], "mean": mean, "lowest": mean, "waited": 0.0}
        waited = state["waited"] + 1
        if waited < self.patience:
            return {**state, "mean": mean, "waited": waited}
        return {"share": min(1.0, state["share"] + self.rise), "mean": mean, "lowest": mean, "waited": 0.0}


_PACES: dict[str, type[Settings]] = {"ramp": Ramp, "cosine": Cosine, "steps": Steps, "competence": Competence, "patience": StalledShare}
"""By the key that only they have."""


def _pace_kind(given: object) -> str:
    """Which of the paces somebody means; what has no key of any is taken for one that listens."""
    if isinstance(given, Mapping):
        return next((key for key in _PACES if key in given), "patience")
    return next((key for key, kind in _PACES.items() if isinstance(given, kind)), "number")


PaceConfig = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[Ramp, Tag("ramp")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[Steps, Tag("steps")]
    | Annotated[Competence, Tag("competence")]
    | Annotated[StalledShare, Tag("patience")],
    Discriminator(_pace_kind),
]
