"""Everything in a training worker that teaches: signals' sources, teachers' output heads, frozen players."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cluster.config import EndpointConfig, TransformersEndpoint
from orchestrator.frozen import FrozenPlayer, load_frozen_players, load_head, not_a_network
from orchestrator.microbatch import MicroBatch
from strategies.core import AnyTerm, Player, StatesTerm
from strategies.head import Head
from strategies.signals import Signal
from strategies.sources import Blended, Source, TakenActions, Taught, read_sources
from strategies.taps import OUTPUT, Tap, Tapped


@dataclass(frozen=True)
class Teachers:
    """Makes what the terms read of a micro-batch on the worker's device."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)
    """By endpoint."""
    frozen: Mapping[str, FrozenPlayer] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        players: Mapping[str, Player],
        sources: Mapping[str, Source],
        endpoints: Mapping[str, EndpointConfig],
        vocabulary: int | None,
        packed: bool,
        device: torch.device,
    ) -> Teachers:
        """Loads heads and frozen players from their endpoints. `Refusal` for one that has no network."""
        frozen = load_frozen_players(players, endpoints, vocabulary, packed, device)
        return cls(sources, {name: _head(name, endpoints[name], device, vocabulary) for name in heads_of(sources)}, frozen)

    def teach(self, micro: MicroBatch, terms: tuple[AnyTerm, ...]) -> MicroBatch:
        """The micro-batch with signals and inner states for `terms`; every frozen player asked runs one forward.

        One without loss tokens gets no signals: nothing will read them.
        """
        names = set(read_sources(self.sources, read_signals(terms)))
        shown = self._shown(micro, terms, names)
        signals = self._signals(micro, names, shown) if micro.loss_tokens else {}
        return replace(micro, signals=signals, taught=shown)

    def _shown(self, micro: MicroBatch, terms: tuple[AnyTerm, ...], names: set[str]) -> dict[str, Tapped]:
        """What frozen players show, by name."""
        wanted: dict[str, set[Tap]] = {}
        for term in terms:
            if isinstance(term, StatesTerm):
                wanted.setdefault(term.signal, set()).update(term.objective.taps.teacher)
        for name in names:
            source = self.sources[name]
            if isinstance(source, Taught) and source.player:
                wanted.setdefault(source.player, set()).add(OUTPUT)
        return {player: self.frozen[player].taps(micro, taps) for player, taps in wanted.items()}

    def _signals(self, micro: MicroBatch, names: set[str], shown: Mapping[str, Tapped]) -> dict[str, Signal]:
        found: dict[str, Signal] = {}
        for name in sorted(names, key=lambda n: isinstance(self.sources[n], Blended)):  # members before their blends
            source = self.sources[name]
            found[name] = source.of(found, micro.columns) if isinstance(source, Blended) else self._signal(micro, name, source, shown)
        return found

    def _signal(self, micro: MicroBatch, name: str, source: Taught | TakenActions, shown: Mapping[str, Tapped]) -> Signal:
        if isinstance(source, TakenActions):
            return source.read(micro.columns)
        if source.player is None:
            columns = {c: micro.columns[f"{name}/{c}"] for c in source.take.columns}
            return source.take.read(columns, self.heads.get(source.endpoint or ""))
        player = self.frozen[source.player]
        answers: dict[str, Tensor] = player.score(micro, shown[source.player].tokens(OUTPUT), source.take.request)
        return source.take.read(answers, player.head)


def read_signals(terms: Iterable[AnyTerm]) -> set[str]:
    """Names of the signals that terms read."""
    return {t.signal for t in terms if not isinstance(t, StatesTerm) and t.signal is not None}


def heads_of(sources: Mapping[str, Source]) -> set[str]:
    """Endpoints whose output heads training workers apply."""
    return {s.head_of for s in sources.values() if isinstance(s, Taught) and s.head_of}


def _head(name: str, config: EndpointConfig, device: torch.device, vocabulary: int | None) -> Head:
    if not isinstance(config, TransformersEndpoint):
        raise not_a_network(name)
    return load_head(config, device, vocabulary)
