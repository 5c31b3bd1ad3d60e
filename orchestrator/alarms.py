"""Alarms: rules that tell from a run's metrics that its student goes wrong.

Each rule is a frozen setting and a pure function of what is known so far. It looks only at metrics that are there, compares means of
windows and not single steps, and wants a change to be both large and far outside the noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, model_validator

from orchestrator.history import History, Window
from orchestrator.settings import Model

SURPRISE, LENGTH, FINISHED, REPEATED = "rollout/surprise", "rollout/length", "rollout/finished", "rollout/repeated"
KL_TO_BASE, REWARD = "rollout/kl_to_base", "rollout/reward"
MOSTLY = 0.5
"""From this share of finished texts on, their length is the student's choice and not the limit's."""
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Finding:
    """What a rule found, in words for a person."""

    what: str
    seen: str
    """The metric, from what to what."""
    do: str

    def __str__(self) -> str:
        return f"{self.what}: {self.seen}. {self.do}"


class Rule(Model):
    """What is common to all alarms."""

    enabled: bool = True
    """Whether anybody looks."""
    stop: bool | None = None
    """Whether the run stops, after a checkpoint; as `alarms.stop` says when absent."""

    def judge(self, history: History, alarms: Alarms) -> Finding | None:
        """What is wrong by now; None while nothing is, or not enough is known."""
        raise NotImplementedError


class EntropyCollapse(Rule):
    """The student loses its doubts: `rollout/surprise`, the nats per token of what it writes, falls far below its start."""

    share: Share = 0.2
    """Alarms below this share of the start,"""
    below_nats: NonNegativeFloat = 0.15
    """where it is also lower than this: a student that learns to write has fewer doubts than random weights."""
    floor_nats: NonNegativeFloat = 0.01
    """Alarms below this whatever the start was; 0 never does."""

    def judge(self, history: History, alarms: Alarms) -> Finding | None:
        now, start = history.latest(SURPRISE, alarms.window_steps), history.start(SURPRISE, alarms.window_steps)
        what = "the student loses its doubts"
        do = (
            "Lower train.lr, let the data's own completions count again, or weigh forward divergences more; where only one answer is "
            "right this may be learning."
        )
        if now is not None and now.mean < self.floor_nats:
            return Finding(what, f"{SURPRISE} is {now}, below {self.floor_nats:g}", do)
        if now is None or start is None or now.mean >= min(self.below_nats, self.share * start.mean):
            return None
        return Finding(what, _moved(start, now), do) if now.is_apart(start, alarms.standard_errors) else None


class LengthCollapse(Rule):
    """Texts shrink: `rollout/length`, in tokens, falls far below its start. Where most early texts ran into the limit, their length
    says nothing of the student, and only the floor counts: learning to stop is no collapse."""

    share: Share = 0.2
    """Alarms below this share of the start."""
    floor_tokens: NonNegativeFloat = 2.0
    """Alarms below this whatever the start was; 0 never does."""

    def judge(self, history: History, alarms: Alarms) -> Finding | None:
        now, start = history.latest(LENGTH, alarms.window_steps), history.start(LENGTH, alarms.window_steps)
        finished = history.start(FINISHED, alarms.window_steps)
        what, do = "texts shrink", "Lower train.lr; look at what is written, and at what a short text is rewarded with."
        if now is not None and now.mean < self.floor_tokens:
            return Finding(what, f"{LENGTH} is {now}, below {self.floor_tokens:g}", do)
        if now is None or start is None or finished is None or finished.mean < MOSTLY or now.mean >= self.share * start.mean:
            return None
        return Finding(what, _moved(start, now), do) if now.is_apart(start, alarms.standard_errors) else None


class LengthExplosion(Rule):
    """Texts grow into their limit: `rollout/finished` falls to a share of its start, or `rollout/length` to a multiple of it."""

    finished_share: Share = 0.5
    """Alarms when the share of finished texts falls below this share of its start, where most were finished."""
    factor: Annotated[float, Field(gt=1)] = 4.0
    """Alarms when texts are longer than this many times their length at the start."""

    def judge(self, history: History, alarms: Alarms) -> Finding | None:
        what = "texts grow without an end"
        do = "Lower train.lr; look at the ends of texts, and whether teacher and student agree on the token that ends one."
        ended, end = history.start(FINISHED, alarms.window_steps), history.latest(FINISHED, alarms.window_steps)
        if ended and end and ended.mean >= MOSTLY and end.mean < self.finished_share * ended.mean:
            return Finding(what, _moved(ended, end), do) if end.is_apart(ended, alarms.standard_errors) else None
        start, now = history.start(LENGTH, alarms.window_steps), history.latest(LENGTH, alarms.window_steps)
        if start is None or now is None or now.mean <= self.factor * start.mean:
            return None
        return Finding(what, _moved(start, now), do) if now.is_apart(start, alarms.standard_errors) else None


class Repetition(Rule):
    """Texts repeat themselves: `rollout/repeated`, the share of four-token pieces that a text has had before, is high and has risen."""

    level: Share = 0.5
    """Alarms above this,"""
    rise: Share = 0.2
    """where it is also so much more than at the start: long texts repeat some pieces anyway."""

    def judge(self, history: History, alarms: Alarms) -> Finding | None:
        start, now = history.start(REPEATED, alarms.window_steps), history.latest(REPEATED, alarms.window_steps)
        if start is None or now is None or now.mean <= max(self.level, start.mean + self.rise):
            return None
        if not now.is_apart(start, alarms.standard_errors):
            return None
        do = "Lower train.lr, shorten strategy.max_new_tokens, or let the data's own completions count again."
        return Finding("texts repeat themselves", _moved(start, now), do)


class BaseKL(Rule):
    """The student leaves its base: `rollout/kl_to_base`, in nats per token, is above a limit and has risen."""

    limit_nats: PositiveFloat = 0.5
    """Alarms above this. What strategies that pull a student back from its base aim at is a tenth of it."""

    def judge(self, history: History, alarms: Alarms) -> Finding | None:
        start, now = history.start(KL_TO_BASE, alarms.window_steps), history.latest(KL_TO_BASE, alarms.window_steps)
        if start is None or now is None or now.mean <= self.limit_nats or now.mean <= start.mean:
            return None
        if not now.is_apart(start, alarms.standard_errors):
            return None
        do = "Lower train.lr, extrapolate less, or compare with another base if this one is meant to be left behind."
        return Finding("the student leaves its base", f"{_moved(start, now)}, above {self.limit_nats:g}", do)


class GoldenVersusProxy(Rule):
    """What is optimised gets better while `alarms.golden`, which is not, gets worse: the student exploits its teacher or its reward.

    Teacher hacking as arXiv:2502.02671 describes it; the rule is this project's own. The last `evaluations` are compared with as many
    successive ones in which golden was best, and what is optimised over the same steps.
    """

    proxy: str | None = None
    """The metric that is optimised; when absent `rollout/reward` and the divergences of `eval/`, whichever are there."""
    evaluations: Annotated[int, Field(ge=3)] = 5
    """Held-out evaluations of a mean; there is no alarm before twice as many."""
    standard_errors: PositiveFloat = 4.0
    """Golden must be worse, and the other better, by so many standard errors of the difference. 2 would do for one look; it is looked
    at after every evaluation."""
    share: Share = 0.01
    """Golden must also be worse by this share of its value."""

    def judge(self, history: History, alarms: Alarms) -> Finding | None:
        if alarms.golden is None:
            return None
        best, now = history.best(alarms.golden, self.evaluations), history.latest(alarms.golden, self.evaluations)
        if best is None or now is None or not best.is_better(now) or abs(now.mean - best.mean) <= self.share * abs(best.mean):
            return None
        if not now.is_apart(best, self.standard_errors, history.jitter(alarms.golden) / self.evaluations**0.5):
            return None
        for name in [self.proxy] if self.proxy else self._proxies(history, alarms.golden):
            before, after = history.during(best, name), history.during(now, name)
            if before and after and after.is_better(before) and after.is_apart(before, self.standard_errors):
                do = "Take an earlier checkpoint; then fewer passes over the data, more prompts, text written anew, or a lower train.lr."
                seen = f"{_moved(best, now)}, while {name} went from {before.mean:.4g} to {after.mean:.4g}"
                return Finding("what is optimised gets better and what counts gets worse", seen, do)
        return None

    def _proxies(self, history: History, golden: str) -> list[str]:
        divergences = [n for n in history.names() if n.startswith("eval/") and n.endswith(("forward_kl", "reverse_kl"))]
        return [name for name in (REWARD, *divergences) if name != golden]


def switch(value: Any) -> Any:
    """Lets `false` stand for settings with `enabled: false`."""
    return {"enabled": value} if isinstance(value, bool) else value


_OR_FALSE = BeforeValidator(switch)


class Alarms(Model):
    """When to warn that a run goes wrong, and whether to stop it. `false` in place of an alarm's settings switches it off."""

    enabled: bool = True
    """Whether anybody looks; `alarms: false` is the same."""
    stop: bool = False
    """A run whose alarm rises ends with exit code 3 after a checkpoint."""
    golden: str | None = None
    """Held-out metric that counts, such as `eval/cross_entropy`: it must not get worse while what is optimised gets better."""
    window_steps: Annotated[int, Field(ge=2)] = 20
    """Steps whose mean is compared with that of as many first ones."""
    standard_errors: PositiveFloat = 4.0
    """Changes count when they are larger than so many standard errors of the windows' difference."""
    entropy_collapse: Annotated[EntropyCollapse, _OR_FALSE] = EntropyCollapse()
    length_collapse: Annotated[LengthCollapse, _OR_FALSE] = LengthCollapse()
    length_explosion: Annotated[LengthExplosion, _OR_FALSE] = LengthExplosion()
    repetition: Annotated[Repetition, _OR_FALSE] = Repetition()
    base_kl: Annotated[BaseKL, _OR_FALSE] = BaseKL()
    golden_versus_proxy: Annotated[GoldenVersusProxy, _OR_FALSE] = GoldenVersusProxy()

    @model_validator(mode="after")
    def _two_metrics(self) -> Alarms:
        if self.golden is not None and self.golden == self.golden_versus_proxy.proxy:
            raise ValueError("expected alarms.golden and alarms.golden_versus_proxy.proxy to be two metrics")
        return self

    def rules(self) -> Iterator[tuple[str, Rule]]:
        """Those that anybody looks at, by the name of their alarm."""
        for name in type(self).model_fields:
            rule = getattr(self, name)
            if isinstance(rule, Rule) and rule.enabled and self.enabled:
                yield name, rule

    def stops(self, name: str) -> bool:
        """Whether the alarm ends the run."""
        own: bool | None = getattr(self, name).stop
        return self.stop if own is None else own

    def unstopping(self, name: str) -> str:
        """The override that lets a run go on although the alarm stands."""
        return "alarms.stop=false" if getattr(self, name).stop is None else f"alarms.{name}.stop=false"

    def history(self) -> History:
        """An empty one, that keeps what the rules read."""
        proxy = self.golden_versus_proxy.proxy
        return History(frozenset({proxy} if proxy else ()))

    def judge(self, history: History) -> dict[str, Finding]:
        """What is wrong by now, by the name of the alarm."""
        found = {name: rule.judge(history, self) for name, rule in self.rules()}
        return {name: finding for name, finding in found.items() if finding is not None}


def _moved(start: Window, now: Window) -> str:
    return f"{start.metric} was {start} and is {now}"
