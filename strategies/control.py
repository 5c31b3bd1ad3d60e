"""Controllers: numbers that move by what training reports, such as a share that grows while the student stops improving.

A controller is pure. What it remembers is a state of named numbers, which training workers hold and every checkpoint keeps; they
tell it what a step or an evaluation was found to be over all ranks, so that all ranks know the same. Its value reaches objectives
through `Progress.controls`, and stages as the column `control/<name>`: as it was when the student went out that is due for the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field

from strategies.core import Columns, Progress, Settings

CONTROL = "control/"
"""Before a controller's name among the columns of a bundle and among metrics."""

State = Mapping[str, float]
Value = float | Mapping[str, float]
"""A number, or several by name; they travel as `<controller>` and `<controller>/<name>`."""


class Controller(Protocol):
    """A schedule with a memory."""

    @property
    def hears(self) -> frozenset[str]:
        """Names of the metrics that it reads, such as `loss/kd` or `eval/cross_entropy`."""
        ...

    def begin(self) -> State:
        """What it knows before the first step."""
        ...

    def after_step(self, state: State, metrics: Mapping[str, float], progress: Progress) -> State:
        """What it knows after the step at `progress`, of which `metrics` tell. Steps that were skipped are not told."""
        ...

    def after_evaluation(self, state: State, metrics: Mapping[str, float]) -> State:
        """What it knows after an evaluation on held-out rows that the recipe asked for."""
        ...

    def value(self, state: State) -> Value: ...


@dataclass(frozen=True)
class Controlled:
    """The schedule that is the value of a controller of the strategy, by name."""

    control: str

    def __call__(self, progress: Progress) -> float:
        return progress.controls[self.control]


class AdaptiveShare(Settings):
    """A share that grows whenever the held-out loss has risen: DistiLLM (arXiv:2402.03898), with the defaults of its released code.

    After an evaluation whose loss is at least `tolerance` above the one remembered, `rise` is added, up to 1, and that loss is
    remembered. The first evaluation is remembered as it is.
    """

    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share before the first evaluation."""
    rise: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Added each time."""
    tolerance: float = 0.1
    """By how much the loss must have risen, in its own unit; a negative number also counts losses that fell by less."""
    metric: Annotated[str, Field(pattern="^eval/")] = "eval/cross_entropy"
    """The held-out loss, smaller is better: any metric of an evaluation."""

    @property
    def hears(self) -> frozenset[str]:
        return frozenset({self.metric})

    def begin(self) -> State:
        return {"share": self.start}

    def after_step(self, state: State, metrics: Mapping[str, float], progress: Progress) -> State:
        return state

    def after_evaluation(self, state: State, metrics: Mapping[str, float]) -> State:
        loss = metrics[self.metric]
        if "loss" not in state:
            return {**state, "loss": loss}
        risen = loss >= state["loss"] + self.tolerance
        return {"share": min(1.0, state["share"] + self.rise), "loss": loss} if risen else state

    def value(self, state: State) -> float:
        return state["share"]


def begun(controllers: Mapping[str, Controller]) -> dict[str, float]:
    """Values before the first step."""
    return values_by_name({name: c.begin() for name, c in controllers.items()}, controllers)


def values_by_name(states: Mapping[str, State], controllers: Mapping[str, Controller]) -> dict[str, float]:
    """The numbers of all controllers by the names under which they travel."""
    found: dict[str, float] = {}
    for name, controller in controllers.items():
        value = controller.value(states[name])
        found |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def told(columns: Columns) -> dict[str, float]:
    """Values of controllers that came with a bundle."""
    return {name.removeprefix(CONTROL): float(values[0]) for name, values in columns.items() if name.startswith(CONTROL)}
