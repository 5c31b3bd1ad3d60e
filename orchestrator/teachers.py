"""Everything in a training worker that teaches: signals' sources, teachers' output heads, frozen players."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cluster.config import EndpointConfig, TransformersEndpoint
from orchestrator.frozen import FrozenPlayer, Shows, load_ends, load_frozen_players, load_head, not_a_network
from orchestrator.microbatch import MicroBatch
from strategies.aligned import UNITS, Ends
from strategies.core import AnyTerm, Player, StatesTerm
from strategies.head import Head
from strategies.signals import Signal
from strategies.sources import Blended, ForeignStates, Source, TakenActions, Taught, read_sources
from strategies.taps import OUTPUT, Tap, Tapped


@dataclass(frozen=True)
class Teachers:
    """Makes what the terms read of a micro-batch on the worker's device."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)
    """By endpoint."""
    frozen: Mapping[str, FrozenPlayer] = field(default_factory=dict)
    foreign: Mapping[str, LaidStates] = field(default_factory=dict)
    """Teachers with other tokenizers whose states come with the rows, by signal."""
    units: Tensor | None = None
    """`(B,)` int64 the student's ids that begin a unit of text."""

    @property
    def shown(self) -> dict[str, Shows]:
        """Whose inner states terms read, by the name that they give."""
        return {**self.frozen, **self.foreign}

    @classmethod
    def load(
        cls,
        players: Mapping[str, Player],
        sources: Mapping[str, Source],
        endpoints: Mapping[str, EndpointConfig],
        vocabulary: int | None,
        packed: bool,
        device: torch.device,
        units: Sequence[int] = (),
    ) -> Teachers:
        """Loads heads and frozen players from their endpoints. `Refusal` for one that has no network."""
        frozen = load_frozen_players(players, endpoints, vocabulary, packed, device)
        taught = {name: source for name, source in sources.items() if isinstance(source, Taught)}
        heads = {name: load_head(_network(name, endpoints), device, vocabulary) for name in heads_of(taught)}
        states = {name: source for name, source in sources.items() if isinstance(source, ForeignStates)}
        foreign = {name: LaidStates(name, s, load_ends(_network(s.endpoint, endpoints), device)) for name, s in states.items()}
        return cls(sources, heads, frozen, foreign, torch.tensor(units, dtype=torch.int64, device=device))

    def teach(self, micro: MicroBatch, terms: tuple[AnyTerm, ...]) -> MicroBatch:
        """The micro-batch with signals and inner states for `terms`; every frozen player asked runs one forward.

        One without loss tokens gets no signals: nothing will read them.
        """
        names = set(read_sources(self.sources, (t.signal for t in terms if not isinstance(t, StatesTerm) and t.signal is not None)))
        shown = self._shown(micro, terms, names)
        signals = self._signals(micro, names, shown) if micro.loss_tokens else {}
        return replace(micro, signals=signals, taught=shown)

    def _shown(self, micro: MicroBatch, terms: tuple[AnyTerm, ...], names: set[str]) -> dict[str, Tapped]:
        """What teachers show of their inner states, by name."""
        wanted: dict[str, set[Tap]] = {}
        for term in terms:
            if isinstance(term, StatesTerm):
                wanted.setdefault(term.signal, set()).update(term.objective.taps.teacher)
        for name in names:
            source = self.sources[name]
            if isinstance(source, Taught) and source.player:
                wanted.setdefault(source.player, set()).add(OUTPUT)
        return {name: self.shown[name].taps(micro, taps) for name, taps in wanted.items()}

    def _signals(self, micro: MicroBatch, names: set[str], shown: Mapping[str, Tapped]) -> dict[str, Signal]:
        found: dict[str, Signal] = {}
        for name in sorted(names, key=lambda n: isinstance(self.sources[n], Blended)):  # members before their blends
            source = self.sources[name]
            found[name] = source.of(found, micro.columns) if isinstance(source, Blended) else self._signal(micro, name, source, shown)
        return found

    def _signal(self, micro: MicroBatch, name: str, source: Source, shown: Mapping[str, Tapped]) -> Signal:
        if isinstance(source, TakenActions):
            return source.read(micro.columns)
        assert isinstance(source, Taught), "terms on logits read nothing else"
        if source.player is None:
            columns = {c: micro.columns[f"{name}/{c}"] for c in source.take.columns}
            if self.units is not None:
                columns[UNITS] = self.units
            return source.take.read(columns, self.heads.get(source.endpoint or ""))
        player = self.frozen[source.player]
        answers: dict[str, Tensor] = player.score(micro, shown[source.player].tokens(OUTPUT), source.take.request)
        return source.take.read(answers, player.head)


@dataclass(frozen=True)
class LaidStates:
    """A teacher with another tokenizer, whose states at its own tokens come as columns of the signal `name`."""

    name: str
    source: ForeignStates
    ends: Ends

    def widths(self, wanted: Collection[Tap]) -> dict[Tap, int]:
        """See `orchestrator.frozen.Shows`: there is nothing but the output."""
        if set(wanted) - {OUTPUT}:
            raise ValueError(
                f"{next(iter(set(wanted) - {OUTPUT}))}: got a teacher that shows its output alone; expected hidden of the output"
            )
        return dict.fromkeys(wanted, self.ends.head.weight.shape[-1])

    def taps(self, micro: MicroBatch, wanted: Collection[Tap]) -> Tapped:
        """See `orchestrator.frozen.Shows`."""
        columns = micro.columns if micro.loss_tokens else self._nothing(micro.index)
        return self.source.read(self.name, columns, micro.rows.flatten()[micro.index], self.ends)

    def _nothing(self, index: Tensor) -> dict[str, Tensor]:
        """The columns of no token."""
        return dict.fromkeys(self.source.columns(self.name), index.new_zeros((0, 1)))


def read_signals(terms: Iterable[AnyTerm], sources: Mapping[str, Source]) -> set[str]:
    """Names of those of `sources` that terms read."""
    return {t.signal for t in terms if t.signal is not None and (t.signal in sources or not isinstance(t, StatesTerm))}


def heads_of(sources: Mapping[str, Source]) -> set[str]:
    """Endpoints whose output heads training workers apply."""
    return {s.head_of for s in sources.values() if isinstance(s, Taught | ForeignStates) and s.head_of}


def _network(name: str, endpoints: Mapping[str, EndpointConfig]) -> TransformersEndpoint:
    config = endpoints[name]
    if not isinstance(config, TransformersEndpoint):
        raise not_a_network(name)
    return config
