"""A loss written out in the recipe: a list of terms, each an objective with a weight, on signals of any number of teachers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from strategies.core import AnyTerm, Player, Settings, StatesTerm, Strategy, StrategyConfig, Term, lm_update
from strategies.objectives import AnyObjective
from strategies.schedule import ScheduleConfig, schedule
from strategies.sources import Blended, Source, TakeConfig, TakeTopK, Taught
from strategies.stages.score import Score


def _named(value: Any) -> Any:
    """A plain string stands for the settings of that type with their defaults."""
    return {"type": value} if isinstance(value, str) else value


class SignalConfig(Settings):
    """What one teacher gives, or a blend of others; exactly one of `endpoint`, `player` and `blend`."""

    endpoint: str | None = None
    """Endpoint that scores the rows in the stream, ahead of the student."""
    player: str | None = None
    """Endpoint whose model every training worker loads and runs on the micro-batch in hand."""
    take: Annotated[TakeConfig, BeforeValidator(_named)] = TakeTopK()
    """What is taken of its predictions: `topk`, `dense`, `sampled`, `hidden` or `per-token`."""
    blend: dict[str, float] | None = None
    """Weights of other signals by name."""
    kind: Literal["mixture", "product"] = "mixture"
    """`mixture` averages probabilities; `product` averages their logarithms."""

    @model_validator(mode="after")
    def _one(self) -> SignalConfig:
        if sum(x is not None for x in (self.endpoint, self.player, self.blend)) != 1:
            raise ValueError("expected one of endpoint, player and blend, such as {endpoint: teacher, take: topk}")
        return self

    @property
    def source(self) -> Source:
        if self.blend is not None:
            return Blended(dict(self.blend), self.kind)
        return Taught(self.take, endpoint=self.endpoint, player=self.player)


class TermConfig(Settings):
    """One summand of the loss."""

    objective: Annotated[AnyObjective, BeforeValidator(_named)]
    """What is computed: a name, or a name with settings; `distill objectives` lists them."""
    name: str | None = None
    """Name in metrics and weight columns; the objective's type when absent."""
    weight: ScheduleConfig = 1.0
    """Multiplies the term's mean over its tokens. Weights are never divided by their sum, and may be negative."""
    filters: str | None = None
    """Terms on inner states that name the same share what is trained beside the student."""
    signal: str | None = None
    """The signal it reads, or the frozen player whose inner states it compares with; may be left out when there is only one."""


class Terms(StrategyConfig):
    """Any sum of objectives on any signals: the loss as a list of terms, for what no named strategy says.

    Every term is divided by its own count of tokens over the whole step, then multiplied by its weight. All terms share one
    forward and one pass over the logits. Does not sample from anybody.
    """

    type: Literal["terms"] = "terms"
    signals: dict[str, SignalConfig] = Field(default_factory=lambda: {"teacher": SignalConfig(endpoint="teacher")})
    """What the terms read, by name."""
    terms: Annotated[tuple[TermConfig, ...], Field(min_length=1)]
    """The summands."""

    @model_validator(mode="after")
    def _members(self) -> Terms:
        for name, signal in self.signals.items():
            for member in signal.blend or {}:
                if member not in self.signals or self.signals[member].blend is not None:
                    plain = [n for n, s in self.signals.items() if s.blend is None]
                    raise ValueError(f"expected signals.{name} to blend others of {', '.join(plain) or 'none'}, and got {member!r}")
        return self

    @model_validator(mode="after")
    def _chosen(self) -> Terms:
        for term in self.terms:
            if term.objective.reads not in ("nothing", "states") and self._signal(term) is None:
                names = ", ".join(self.signals)
                raise ValueError(f"expected the term {term.name or term.objective.type!r} to name its signal, one of {names}, and got none")
        return self

    def build(self) -> Strategy:
        frozen = {s.player for s in self.signals.values() if s.player}
        terms = tuple(self._term(t) for t in self.terms)
        frozen |= {t.signal for t in terms if isinstance(t, StatesTerm)}
        scored = [(s.endpoint, name, s.take) for name, s in self.signals.items() if s.endpoint and self._is_read(name)]
        stages = [Score(name, endpoint, take.request) for endpoint, name, take in sorted(scored, key=lambda s: s[0])]
        return Strategy(
            players={"student": Player()} | {name: Player(model=name, trained=False) for name in sorted(frozen)},
            stages=tuple(stages),
            updates=(lm_update(*terms),),
            signals={name: s.source for name, s in self.signals.items() if self._is_read(name)},
        )

    def _is_read(self, name: str) -> bool:
        """Whether some term reads the signal, itself or in a blend."""
        read = {self._signal(t) for t in self.terms}
        return name in read or any(name in (self.signals[r].blend or {}) for r in read if r in self.signals)

    def _term(self, config: TermConfig) -> AnyTerm:
        name, scale, signal = config.name or config.objective.type, schedule(config.weight), self._signal(config)
        objective: Any = config.objective  # its protocol follows from what it reads
        if objective.reads == "states":
            return StatesTerm(name, objective, scale, signal or "teacher", config.filters)
        return Term(name, objective, scale, signal)

    def _signal(self, config: TermConfig) -> str | None:
        if config.signal is not None or config.objective.reads == "nothing":
            return config.signal
        return next(iter(self.signals)) if len(self.signals) == 1 else None
