"""The networks inside a training worker: loading, wrapping in a layout, forwards and steps by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from orchestrator.config import RunConfig
from orchestrator.frozen import Shows
from orchestrator.layouts import LR_SHARE, Layout, Numerics, make_layout
from orchestrator.microbatch import MicroBatch
from orchestrator.models import FILTERS, StudentModule, check_head, check_packing, load_student, make_filters
from orchestrator.teachers import Teachers
from strategies.core import AnyTerm, Player, Progress, StatesTerm, Update
from strategies.head import TermSums
from strategies.schedule import values_of
from strategies.taps import Tap

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


NOBODY: Mapping[str, Shows] = {}


def load_players(
    run: RunConfig,
    wanted: Mapping[str, Player],
    device: torch.device,
    updates: Sequence[Update] = (),
    shown: Mapping[str, Shows] = NOBODY,
) -> dict[str, Layout]:
    """Every trained player of the strategy, wrapped in the run's layout on this worker.

    With it are wrapped the filters that terms of its `updates` train beside it; `shown` is whose inner states they compare with.
    """
    terms = {name: [t for u in updates if u.player == name for t in u.terms] for name in wanted}
    return {name: _load(run, device, terms[name], shown) for name, player in wanted.items() if player.trained}


def _load(run: RunConfig, device: torch.device, terms: Sequence[AnyTerm], shown: Mapping[str, Shows]) -> Layout:
    model = load_student(run.student, gradient_checkpointing=run.train.gradient_checkpointing, seed=run.seed)
    check_head(model)
    if run.train.batching == "packed":
        check_packing(model)
    filters = make_filters(model, terms, _shown_widths(terms, shown), run.seed)
    model.train()
    train = run.train
    numerics = Numerics(train.clip_norm, PRECISIONS[train.precision], device)

    peak = max(values_of(train.lr))
    rates = {t.filters_name: t.filters_lr / peak for t in terms if isinstance(t, StatesTerm) and t.filters_lr is not None}

    def optimizer(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        groups = parameter_groups(parameters, train.weight_decay, rates)
        return torch.optim.AdamW(groups, lr=peak, betas=train.betas, eps=train.eps, fused=True)

    return make_layout(train.layout, StudentModule(model, filters=filters), optimizer, numerics)


def _shown_widths(terms: Sequence[AnyTerm], shown: Mapping[str, Shows]) -> dict[str, dict[Tap, int]]:
    """Widths of all taps that `terms` read, by who shows them."""
    read = [(t.signal, tap) for t in terms if isinstance(t, StatesTerm) for tap in t.objective.taps.teacher]
    return {name: teacher.widths({tap for signal, tap in read if signal == name}) for name, teacher in shown.items()}


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float, rates: Mapping[str, float]) -> list[dict[str, object]]:
    """Groups of parameters by name; those of filters with a learning rate of their own are groups whose `LR_SHARE` tells it, `rates` by
    `<filters of a term>` as shares of the student's."""
    own = {name: next((r for key, r in rates.items() if f"{FILTERS}.{key}/" in name), None) for name in parameters}
    groups = decay_groups([p for name, p in parameters.items() if own[name] is None], weight_decay)
    for rate in sorted({r for r in own.values() if r is not None}):
        mine = decay_groups([p for name, p in parameters.items() if own[name] == rate], weight_decay)
        groups += [{**group, LR_SHARE: rate} for group in mine]
    return groups


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; vectors (norms and biases) do not. A trained network always has both groups or one."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, object]] = [{"params": matrices, "weight_decay": weight_decay}]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])


@dataclass(frozen=True)
class BoundPlayers:
    """The players with one micro-batch in hand: what an update's loss is given."""

    layouts: Mapping[str, Layout]
    micro: MicroBatch
    scales: Mapping[str, float]
    progress: Progress
    teachers: Teachers = field(default_factory=Teachers)

    def forward(self, player: str, terms: tuple[AnyTerm, ...]) -> TermSums:
        """One forward of `player` through its wrapped module with all `terms` on it, after those of the teachers they read."""
        micro = self.teachers.teach(self.micro, terms)
        loss, sums, pulls = self.layouts[player].module(micro, terms, self.scales, self.progress)
        names = [t.name for t in terms]
        return TermSums(loss=loss, sums=dict(zip(names, sums, strict=True)), pulls=dict(zip(names, pulls, strict=True)))
