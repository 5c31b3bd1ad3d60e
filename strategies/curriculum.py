"""Curricula: which rows a step draws, by how hard they are and by their domains, beside whatever strategy teaches.

Settings alone: a number or a schedule says what is known before the run, a controller (`strategies.control`) what depends on how
training goes. Whoever runs a strategy draws the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator

from strategies.control import Controller, State, Value
from strategies.core import Progress, Settings
from strategies.paces import Competence, PaceConfig, StalledShare
from strategies.schedule import ScheduleConfig, values_of
from strategies.stages.rollout import BASE

PACE, MIXTURE = "pace", "mixture"
"""Names of the controllers of a curriculum."""
Domains = Annotated[tuple[str, ...], Field(min_length=2)]
Rate = Annotated[float, Field(ge=0, le=1)]


class Ordered(Settings):
    """Rows in the order of a score: of the easiest, a share may be drawn, and it grows."""

    by: Literal["length", "column", "teacher-loss", "student-loss"] = "length"
    """What makes a row easy: few tokens, a small number in the column `data.score`, or a small mean of -log p of its loss tokens under
    a teacher, or under the student as it begins. Losses come from a signal store, which is filled before training."""
    teacher: str = "teacher"
    """Endpoint whose loss `teacher-loss` is."""
    descending: bool = False
    """The largest first instead."""
    pace: PaceConfig = Competence(competence=0.2)
    """Share c of the rows, of each domain where there is a mixture, from which a step draws alike: a number or schedule above 0 and up
    to 1, `{competence: 0.1}`, or `{patience: 20}`, which grows when the loss has stopped falling."""

    @property
    def endpoint(self) -> str | None:
        """Whose losses order the rows, where losses do."""
        return {"teacher-loss": self.teacher, "student-loss": BASE}.get(self.by)

    @model_validator(mode="after")
    def _is_a_share(self) -> Ordered:
        values = () if isinstance(self.pace, Competence | StalledShare) else values_of(self.pace)
        if any(not 0 < v <= 1 for v in values):
            raise ValueError("pace: expected values above 0 and up to 1 throughout")
        return self


class FixedMixture(Settings):
    """Shares of domains that are known before the run."""

    type: Literal["shares"] = "shares"
    shares: Annotated[dict[str, ScheduleConfig], Field(min_length=2)]
    """Weight of every domain, a number or a schedule from 0 up; each step draws by their shares of the sum."""

    @model_validator(mode="after")
    def _has_weights(self) -> FixedMixture:
        if any(v < 0 for weight in self.shares.values() for v in values_of(weight)):
            raise ValueError("shares: expected weights of 0 or more")
        return self

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.shares)

    def at(self, progress: Progress) -> tuple[float, ...]:
        """Shares of the domains at a step, which add up to 1."""
        weights = [float(w) if isinstance(w, int | float) else w(progress) for w in self.shares.values()]
        whole = sum(weights)
        if whole <= 0:
            raise ValueError(f"curriculum.mixture: got weights of 0 for all domains at step {progress.step + 1}")
        return tuple(w / whole for w in weights)


def ddk_start(ratios: Sequence[float]) -> list[float]:
    """r0 = softmax(ratios), of one ratio of perplexities per domain."""
    largest = max(ratios)
    weights = [math.exp(r - largest) for r in ratios]
    return [w / math.fsum(weights) for w in weights]


def ddk_update(shares: Sequence[float], ratios: Sequence[float], alpha: float) -> list[float]:
    """r' = alpha psi / sum psi + (1 - alpha) / n with psi_i = r_i exp(ratio_i)."""
    largest = max(ratios)
    psi = [r * math.exp(ratio - largest) for r, ratio in zip(shares, ratios, strict=True)]
    return [alpha * p / math.fsum(psi) + (1 - alpha) / len(psi) for p in psi]


class GapMixture(Settings):
    """Draws most where the student lags behind its teacher most: DDK (arXiv:2407.16154).

    With perplexities l of each domain's held-out rows: the first evaluation sets r = softmax(l_student / l_teacher), every later one
    psi = r exp(l_student / l_teacher), r = alpha psi / sum psi + (1 - alpha) / n. Before it all domains weigh alike. A ratio is at most
    `largest_ratio`, because its exponential would leave nothing to others."""

    type: Literal["ddk"] = "ddk"
    domains: Domains
    teacher: str | dict[str, str] = "teacher"
    """Endpoint whose held-out perplexity the student's is compared with; or one for each domain, where each has a teacher of its own."""
    alpha: Rate = 0.5
    """Share of the mixture that the gap decides; the rest is even."""
    largest_ratio: Annotated[float, Field(gt=0)] = 10.0

    @property
    def hears(self) -> frozenset[str]:
        return frozenset(name for d in self.domains for name in self._names(d))

    def begin(self) -> State:
        return {}

    def after_step(self, state: State, metrics: Mapping[str, float], progress: Progress) -> State:
        return state

    def after_evaluation(self, state: State, metrics: Mapping[str, float]) -> State:
        gaps = [metrics[own] - metrics[teacher] for own, teacher in map(self._names, self.domains)]
        ratios = [min(math.exp(min(gap, 700.0)), self.largest_ratio) for gap in gaps]
        shares = ddk_update([state[d] for d in self.domains], ratios, self.alpha) if state else ddk_start(ratios)
        return dict(zip(self.domains, shares, strict=True))

    def value(self, state: State) -> Value:
        return dict(state) or even(self.domains)

    def _names(self, domain: str) -> tuple[str, str]:
        teacher = self.teacher if isinstance(self.teacher, str) else self.teacher[domain]
        return f"eval/cross_entropy/{domain}", f"eval/teacher_cross_entropy/{teacher}/{domain}"

    @model_validator(mode="after")
    def _teaches_all(self) -> GapMixture:
        if not isinstance(self.teacher, str) and set(self.teacher) != set(self.domains):
            raise ValueError(
                f"teacher: expected an endpoint for each of {', '.join(self.domains)}, and got {', '.join(self.teacher) or 'none'}"
            )
        return self


class SkillMixture(Settings):
    """Draws most where the student fails most, a domain being a skill: the selection of STAT (Skill-Targeted Adaptive Training) with a
    profile that is measured and not told by a teacher.

    w = (1 - alpha) b + alpha f / sum f, with b even and f the profile: of each skill the share of its judged texts that fail, or its
    held-out loss. A profile of zeros, or of nothing yet, leaves b."""

    type: Literal["skills"] = "skills"
    domains: Domains
    by: Literal["failures", "loss"] = "failures"
    """`failures` of the student's own texts, which a verifier judges; `loss` of held-out rows."""
    alpha: Rate = 0.5
    """Share of the mixture that the profile decides."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """f <- s f + (1 - s) x for the share x of a step in which texts of the skill were judged. Losses are taken as they are."""

    @property
    def hears(self) -> frozenset[str]:
        return frozenset(map(self._name, self.domains))

    def begin(self) -> State:
        return {}

    def after_step(self, state: State, metrics: Mapping[str, float], progress: Progress) -> State:
        heard = {d: metrics[self._name(d)] for d in self.domains if self.by == "failures" and self._name(d) in metrics}
        s = self.smoothing
        return {**state, **{d: s * state[d] + (1 - s) * x if d in state else x for d, x in heard.items()}}

    def after_evaluation(self, state: State, metrics: Mapping[str, float]) -> State:
        return {d: metrics[self._name(d)] for d in self.domains} if self.by == "loss" else state

    def value(self, state: State) -> Value:
        whole, base = math.fsum(state.values()), even(self.domains)
        if whole <= 0:
            return base
        return {d: (1 - self.alpha) * base[d] + self.alpha * state.get(d, 0.0) / whole for d in self.domains}

    def _name(self, domain: str) -> str:
        return f"{'rollout/failed' if self.by == 'failures' else 'eval/cross_entropy'}/{domain}"


def even(domains: Sequence[str]) -> dict[str, float]:
    """The same share for each."""
    return dict.fromkeys(domains, 1 / len(domains))


def _with_type(given: object) -> object:
    """Shares need no type to be known as such."""
    return {"type": "shares", **given} if isinstance(given, Mapping) and "shares" in given else given


MixtureConfig = Annotated[FixedMixture | GapMixture | SkillMixture, Field(discriminator="type"), BeforeValidator(_with_type)]


class Curriculum(Settings):
    """Which rows each step draws. `order` alone draws from all rows, `mixture` alone from all rows of each domain, both together from
    the easiest of each."""

    order: Ordered | None = None
    mixture: MixtureConfig | None = None
    lag_steps: NonNegativeInt | None = None
    """The rows of step t depend on what training knew after t - 1 - lag steps. Absent, where rows are read ahead: as many as keeps
    nobody waiting; where the student writes rows, they are as old as the student that does, and this stays absent."""
    control: Literal["none", "random"] = "none"
    """`random` is the control of a curriculum: rows come in the same pace in an order that means nothing, and domains by their share of
    the data's rows."""

    @model_validator(mode="after")
    def _does_something(self) -> Curriculum:
        if self.order is None and self.mixture is None:
            raise ValueError("expected order, mixture or both")
        return self

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that the mixture names."""
        return self.mixture.domains if self.mixture else ()

    def controllers(self) -> dict[str, Controller]:
        """What listens to training, by the names under which the values of `Controlled` numbers are found."""
        found: dict[str, Controller] = {}
        if self.order and isinstance(self.order.pace, StalledShare):
            found[PACE] = self.order.pace
        if isinstance(self.mixture, GapMixture | SkillMixture) and self.control == "none":
            found[MIXTURE] = self.mixture
        return found
