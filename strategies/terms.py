"""A loss written out in the recipe: a list of terms, each an objective with a weight, on signals of any number of teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from strategies.core import AnyTerm, Player, Settings, StatesTerm, Strategy, StrategyConfig, Term, lm_update
from strategies.objectives import AnyObjective
from strategies.objectives.adakd import tempers
from strategies.schedule import ScheduleConfig, schedule
from strategies.sources import Blended, Source, TakeConfig, TakeTopK, Taught, temperable
from strategies.stages.score import Score
from strategies.stages.support import SharedSupport


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
    """Weights of other signals by name. Top-k answers of several are put on the ids of all of them first (`SharedSupport`)."""
    kind: Literal["mixture", "product"] = "mixture"
    """`mixture` averages probabilities; `product` adds up their logarithms by weight, which averages them where weights sum to 1."""

    @model_validator(mode="after")
    def _one(self) -> SignalConfig:
        if sum(x is not None for x in (self.endpoint, self.player, self.blend)) != 1:
            raise ValueError("expected one of endpoint, player and blend, such as {endpoint: teacher, take: topk}")
        return self

    @property
    def taught(self) -> Taught:
        """What the one teacher gives, of a signal that is no blend."""
        return Taught(self.take, endpoint=self.endpoint, player=self.player)


def _check_blend(name: str, blend: SignalConfig, members: Mapping[str, SignalConfig]) -> None:
    """`ValueError` for members that are not distributions over the same outcomes, and for weights that are no shares of a mixture."""
    weights, where = list((blend.blend or {}).values()), f"expected signals.{name}"
    if blend.kind == "mixture" and (any(w < 0 for w in weights) or sum(weights) <= 0):
        raise ValueError(f"{where}.blend to be shares, none below 0 and one above (a product takes other weights), and got {weights}")
    takes = [m.take for m in members.values()]
    kept = [take for take in takes if isinstance(take, TakeTopK)]
    if not takes or any("pair" not in take.gives for take in takes) or 0 < len(kept) < len(takes):
        kinds = ", ".join(take.type for take in takes) or "none"
        raise ValueError(f"{where} to blend whole distributions, all topk or all of dense and hidden, and got {kinds}")
    if len(kept) > 1 and (any(m.player for m in members.values()) or any(take.tail != "bucket" for take in kept)):
        raise ValueError(
            f"{where} to blend topk answers of endpoints with tail: bucket, which are put on the same ids; take dense of players"
        )


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
    def _blends(self) -> Terms:
        for name, signal in self.signals.items():
            if signal.blend is not None:
                _check_blend(name, signal, {m: self.signals[m] for m in signal.blend})
        return self

    @model_validator(mode="after")
    def _chosen(self) -> Terms:
        for term in self.terms:
            if term.objective.reads not in ("nothing", "states") and self._signal(term) is None:
                names = ", ".join(self.signals)
                raise ValueError(f"expected the term {term.name or term.objective.type!r} to name its signal, one of {names}, and got none")
        return self

    @model_validator(mode="after")
    def _tempered(self) -> Terms:
        for signal in [self._signal(term) for term in self.terms if tempers(term.objective)]:
            for name in self.signals[signal].blend or [signal] if signal in self.signals else ():
                temperable(self.signals[name].take)
        return self

    def build(self) -> Strategy:
        frozen = {s.player for s in self.signals.values() if s.player}
        terms = tuple(self._term(t) for t in self.terms)
        frozen |= {t.signal for t in terms if isinstance(t, StatesTerm)}
        scored = [(s.endpoint, name, s.take) for name, s in self.signals.items() if s.endpoint and self._is_read(name)]
        stages = [Score(name, endpoint, take.request) for endpoint, name, take in sorted(scored, key=lambda s: s[0])]
        return Strategy(
            players={"student": Player()} | {name: Player(model=name, trained=False) for name in sorted(frozen)},
            stages=(*stages, *(SharedSupport(tuple(s.blend or {}), f"{name}/") for name, s in self._on_shared_ids().items())),
            updates=(lm_update(*terms),),
            signals=self._sources(),
        )

    def _on_shared_ids(self) -> dict[str, SignalConfig]:
        """Blends that some term reads whose members' top-k answers are put on the same ids."""
        blends = {name: s for name, s in self.signals.items() if s.blend and len(s.blend) > 1 and self._is_read(name)}
        return {name: s for name, s in blends.items() if all(isinstance(self.signals[m].take, TakeTopK) for m in s.blend or {})}

    def _sources(self) -> dict[str, Source]:
        """Of the signals that are read; members of a blend on the same ids are signals behind its name."""
        found: dict[str, Source] = {}
        for name, signal in self.signals.items():
            if not self._is_read(name):
                continue
            if signal.blend is None:
                found[name] = signal.taught
                continue
            prefix = f"{name}/" if name in self._on_shared_ids() else ""
            takes = {member: self.signals[member].take for member in signal.blend}
            found |= {prefix + member: Taught(take) for member, take in takes.items() if prefix}
            gives = frozenset.intersection(*(take.gives for take in takes.values()))
            found[name] = Blended({prefix + member: weight for member, weight in signal.blend.items()}, signal.kind, gives)
        return found

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
