"""The block `search` of a recipe: which settings take which values, what is best, and how much may be spent on it."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orchestrator.history import smaller_is_better
from orchestrator.settings import Model

KINDS = ("choice", "uniform", "log_uniform", "integer")
COSTS = ("tokens", "seconds", "parameters")
"""What a trial has cost: trained tokens, seconds of its steps, parameters of its student."""


class Domain(Model):
    """The values that one setting may take: exactly one of `choice`, `uniform`, `log_uniform` and `integer`."""

    choice: tuple[JsonValue, ...] | None = None
    """Any values: numbers, names, whole strategies, lists of terms."""
    uniform: tuple[float, float] | None = None
    """Numbers from the first to the second."""
    log_uniform: tuple[float, float] | None = None
    """Positive numbers, each order of magnitude as likely as another."""
    integer: tuple[int, int] | None = None
    """Whole numbers, both ends included."""
    when: dict[str, JsonValue] = Field(default_factory=dict)
    """Only where these settings, by dotted path, have this value or one of these. Elsewhere the recipe's own stays."""
    rescore: bool = False
    """Its values ask teachers other questions, so that trials do not share one store of signals; each value has its own."""

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest number of a domain that is no choice."""
        low, high = getattr(self, self.kind)
        return low, high

    @model_validator(mode="after")
    def _is_one_domain(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("at least one value to choose from")
            return self
        low, high = self.bounds
        if low >= high:
            raise ValueError(f"a range whose first end is below its second, not {low:g} to {high:g}")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"a range above 0, not from {low:g}")
        return self


class Objective(Model):
    """What a trial is judged by."""

    metric: str = "eval/cross_entropy"
    """A held-out metric, or what a trial costs: `tokens`, `seconds` or `parameters`. It must mean the same in every trial: held-out
    metrics are measured at temperature 1 on the same rows, whatever is trained on."""
    mode: Literal["min", "max"] | None = None
    """Whether smaller or larger is better. Absent: as the metric means it, smaller of losses, divergences and costs, larger of all else."""

    @property
    def direction(self) -> Literal["min", "max"]:
        """`mode`, or what the metric means."""
        return self.mode or ("min" if self.metric in COSTS or smaller_is_better(self.metric) else "max")

    @property
    def sign(self) -> float:
        """Makes smaller better."""
        return 1.0 if self.direction == "min" else -1.0


class SchedulerConfig(Model):
    """What becomes of trials before their last step, by what they have reached at held-out evaluations."""

    type: Literal["none", "asha", "median", "pbt"] = "none"
    """`asha`: at each of ever later steps a trial pauses, and goes on from its checkpoint once it is among the best share of those that
    came so far (successive halving, arXiv:1810.05934, algorithm 2). `median`: a trial is stopped that is worse than the median of the
    others' means so far. `pbt`: all trials train at once, and the worst go on from checkpoints of the best with other values
    (population-based training, arXiv:1711.09846); what is found is a schedule."""
    first_steps: PositiveInt | None = None
    """No trial is paused or stopped before; the first evaluation when absent."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """Of `asha`: one in so many goes on, and the next look comes after so many times as many steps."""
    min_trials: PositiveInt = 3
    """Of `median`: trials to compare with."""
    every_steps: PositiveInt | None = None
    """Of `pbt`: steps from one comparison to the next, each with an evaluation and a checkpoint; `evaluate.every_steps` when absent."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Of `pbt`: this share of the trials, the worst, goes on from as many of the best; at least one."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Of `pbt`: how often a value is drawn anew; else it is multiplied by 0.8 or 1.2 within its domain, or becomes its neighbour in a
    choice."""

    def rung_steps(self, rung: int, first_evaluation: int) -> int:
        """Of `asha`: the steps after which a trial comes to a rung, which are numbered from 0."""
        return ceil(round((self.first_steps or first_evaluation) * self.reduction**rung, 6))


def _objectives(value: Any) -> Any:
    """One, several, or names of metrics."""
    given = value if isinstance(value, list | tuple) else [value]
    return tuple({"metric": v} if isinstance(v, str) else v for v in given)


class SearchConfig(Model):
    """What is tried, how it is judged, and what may be spent."""

    space: dict[str, Domain]
    """Domains by dotted path of the recipe; items of lists by number, as in `strategy.terms.0.weight`."""
    sampler: Literal["random", "grid", "tpe"] = "tpe"
    """`tpe`: Optuna's tree of Parzen estimators, which learns from earlier trials. `grid`: every combination, in order."""
    random_trials: PositiveInt = 4
    """Of `tpe`: trials drawn at random before it learns from them."""
    seed: NonNegativeInt = 0
    """Of proposals; the runs keep the recipe's own."""
    scheduler: Annotated[SchedulerConfig, BeforeValidator(lambda v: {"type": v} if isinstance(v, str) else v)] = SchedulerConfig()
    objective: Annotated[tuple[Objective, ...], BeforeValidator(_objectives), Field(min_length=1)] = (Objective(),)
    """One, or several: then no trial is best, and those that none beats in everything are the front. The scheduler looks at the first."""
    trials: PositiveInt = 8
    """Most that are begun."""
    tokens: PositiveInt | None = None
    """When so many tokens have been trained on in all, no trial begins, and those under way end at their next evaluation."""
    seconds: PositiveFloat | None = None
    """The same for the time since the search began or went on."""
    concurrent: PositiveInt = 1
    """Trials at once."""
    baseline: bool = True
    """At the end also train the best trial's student without a teacher, on the same rows and steps, where it has one."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.space:
            raise ValueError("at least one setting to search")
        return self
