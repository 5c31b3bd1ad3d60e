"""Schedules: any scalar of a recipe may be a number, a ramp, a cosine or a list of steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from strategies.core import Progress, Schedule, Settings


class Ramp(Settings):
    """Straight line between two values, then constant: `{ramp: [0.1, 0.9], over_steps: 500}`."""

    ramp: tuple[float, float]
    over_steps: PositiveInt | None = None
    """Steps the line takes; the whole run when absent."""
    from_step: NonNegativeInt = 0

    def __call__(self, progress: Progress) -> float:
        start, end = self.ramp
        return start + (end - start) * _share(progress, self.from_step, self.over_steps)


class Cosine(Settings):
    """Half a cosine between two values, then constant: `{cosine: [1.0, 0.0]}`."""

    cosine: tuple[float, float]
    over_steps: PositiveInt | None = None
    from_step: NonNegativeInt = 0

    def __call__(self, progress: Progress) -> float:
        start, end = self.cosine
        share = _share(progress, self.from_step, self.over_steps)
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def _rising(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    steps = [step for step, _ in points]
    if not steps or steps[0] != 0 or any(a >= b for a, b in pairwise(steps)):
        raise ValueError("expected rising steps starting at 0, such as [[0, 1.0], [100, 0.5]]")
    return points


class Steps(Settings):
    """Piecewise constant: `{steps: [[0, 1.0], [100, 0.5]]}` is 1.0 before step 100 and 0.5 from there."""

    steps: Annotated[tuple[tuple[NonNegativeInt, float], ...], AfterValidator(_rising)]

    def __call__(self, progress: Progress) -> float:
        return next(value for step, value in reversed(self.steps) if step <= progress.step)


ScheduleConfig = float | Ramp | Cosine | Steps
"""What a recipe may write where a scalar stands."""


def _each_positive(value: ScheduleConfig) -> ScheduleConfig:
    if any(v <= 0 for v in values_of(value)):
        raise ValueError("expected values above 0 throughout the schedule")
    return value


PositiveSchedule = Annotated[ScheduleConfig, AfterValidator(_each_positive)]


def _each_a_share(value: ScheduleConfig) -> ScheduleConfig:
    if any(not 0 <= v <= 1 for v in values_of(value)):
        raise ValueError("expected values from 0 to 1 throughout the schedule")
    return value


Share = Annotated[ScheduleConfig, AfterValidator(_each_a_share)]
"""A number from 0 to 1, or a schedule of such numbers."""


def values_of(value: ScheduleConfig) -> tuple[float, ...]:
    """The extreme values a schedule visits."""
    if isinstance(value, Ramp):
        return value.ramp
    if isinstance(value, Cosine):
        return value.cosine
    if isinstance(value, Steps):
        return tuple(v for _, v in value.steps)
    return (value,)


def schedule(value: ScheduleConfig) -> Schedule:
    """The callable behind a recipe's scalar."""
    if isinstance(value, Ramp | Cosine | Steps):
        return value
    return constant(float(value))


def constant(value: float) -> Schedule:
    """The schedule that is always `value`."""
    return _Constant(value=value)


class _Constant(Settings):
    value: float

    def __call__(self, progress: Progress) -> float:
        return self.value


def _share(progress: Progress, start: int, over: int | None) -> float:
    length = over if over is not None else max(1, progress.steps - start)
    return min(1.0, max(0.0, (progress.step - start) / length))


class LearningRate(Settings):
    """Multiplier of the peak learning rate: linear warm-up, then the named decay, which reaches `final` after the last step."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final: Annotated[float, Field(ge=0, le=1)] = 0.0

    def __call__(self, progress: Progress) -> float:
        if progress.step < self.warmup_steps:
            return (progress.step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear":
            return Ramp(ramp=(1.0, self.final), from_step=self.warmup_steps)(progress)
        return Cosine(cosine=(1.0, self.final), from_step=self.warmup_steps)(progress)
