"""Checks of frozen players and of what is compared with them: endpoints that load, layers that exist, widths that fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.config import EndpointConfig, SavedModel, TransformersEndpoint
from orchestrator.checks.networks import Cast
from orchestrator.checks.teaching import named_endpoints
from orchestrator.config import Job, StudentConfig
from orchestrator.errors import Refusal
from orchestrator.frozen import not_a_network
from orchestrator.sketch import Network, inner_widths
from orchestrator.teachers import heads_of
from strategies.core import StatesTerm, Strategy
from strategies.sources import ForeignStates


@dataclass(frozen=True)
class Inner:
    """What the terms on inner states hold in every training worker."""

    filters: int = 0
    """Numbers trained beside the student."""
    heads: tuple[Network, ...] = ()
    """Networks whose output heads are applied; twice, if their input embeddings are read and are a table of their own."""
    frozen: tuple[tuple[Network, SavedModel, int], ...] = ()
    """Each frozen player's network, how it is loaded, and the width of all that it shows of one token."""


def frozen_endpoints(job: Job, strategy: Strategy) -> dict[str, EndpointConfig]:
    """Endpoints that frozen players load, on the resources of a training worker. `Refusal` for one that loads no network."""
    found = named_endpoints(job, {p.model for p in strategy.players.values() if not p.trained})
    for name, config in found.items():
        if not isinstance(config, TransformersEndpoint):
            raise not_a_network(name)
    return {name: config.model_copy(update={"resources": job.cluster.resources.worker}) for name, config in found.items()}


def check_states(job: Job, strategy: Strategy, people: Cast, endpoints: Mapping[str, EndpointConfig]) -> Inner:
    """Every tap exists and every pair of widths can be compared. `Refusal` for what cannot. `endpoints` are the frozen ones."""
    where = f"strategy.{job.run.strategy.type}"
    frozen = {name: player.model for name, player in strategy.players.items() if not player.trained}
    foreign = _foreign(job, strategy)
    shown = frozen | foreign
    terms = [t for update in strategy.updates for t in update.terms if isinstance(t, StatesTerm)]
    kept: dict[str, int] = dict.fromkeys(frozen.values(), 0)
    filters: dict[str, int] = {}
    for term in terms:
        taps, teacher = term.objective.taps, people.teachers[shown[term.signal]]
        try:
            mine = inner_widths(people.student, job.run.student, taps.student)
            theirs = inner_widths(teacher, _as_student(teacher), taps.teacher)
            kept[shown[term.signal]] = kept.get(shown[term.signal], 0) + sum(theirs.values())
            with torch.device("meta"):
                made = term.objective.filters(mine, theirs) if mine and theirs else {}
        except ValueError as error:
            got, _, expected = str(error).partition("; expected ")
            do = "Choose other layers, widths or heads."
            raise Refusal(f"{where}: term {term.name!r}", got, expected or "inner states that can be compared", do) from error
        filters |= {f"{term.filters_name}/{name}": module.weight.numel() for name, module in made.items()}
    loaded = ((people.teachers[name], config.saved_model, kept[name]) for name, config in endpoints.items())
    ends = [*heads_of(strategy.signals), *(name for name in foreign.values() if not people.teachers[name].tied)]
    heads = tuple(people.teachers[name] for name in sorted(ends) if name in people.teachers)
    return Inner(sum(filters.values()), heads, tuple((network, saved, width) for network, saved, width in loaded if saved))


def _foreign(job: Job, strategy: Strategy) -> dict[str, str]:
    """Endpoints by the signal of their states at tokens of their own. `Refusal` for one whose output head nobody can load."""
    found = {name: source.endpoint for name, source in strategy.signals.items() if isinstance(source, ForeignStates)}
    for name, config in named_endpoints(job, found.values()).items():
        if not isinstance(config, TransformersEndpoint):
            raise not_a_network(name)
    return found


def _as_student(teacher: Network) -> StudentConfig:
    return StudentConfig(model=teacher.source, trust_remote_code=teacher.trust_remote_code)
