"""The networks inside a training worker: loading, wrapping in a layout, forwards and steps by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from orchestrator.config import RunConfig
from orchestrator.frozen import FrozenPlayer
from orchestrator.layouts import Layout, Numerics, make_layout
from orchestrator.microbatch import MicroBatch
from orchestrator.models import StudentModule, check_head, check_packing, load_student, make_filters
from orchestrator.teachers import Teachers
from strategies.core import AnyTerm, Player, Progress, StatesTerm, Update
from strategies.head import TermSums
from strategies.schedule import values_of
from strategies.taps import Tap

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


NOBODY: Mapping[str, FrozenPlayer] = {}


def load_players(
    run: RunConfig,
    wanted: Mapping[str, Player],
    device: torch.device,
    updates: Sequence[Update] = (),
    frozen: Mapping[str, FrozenPlayer] = NOBODY,
) -> dict[str, Layout]:
    """Every trained player of the strategy, wrapped in the run's layout on this worker.

    With it are wrapped the filters that terms of its `updates` train beside it; `frozen` are the players they compare with.
    """
    terms = {name: [t for u in updates if u.player == name for t in u.terms] for name in wanted}
    return {name: _load(run, device, terms[name], frozen) for name, player in wanted.items() if player.trained}


def _load(run: RunConfig, device: torch.device, terms: Sequence[AnyTerm], frozen: Mapping[str, FrozenPlayer]) -> Layout:
    model = load_student(run.student, gradient_checkpointing=run.train.gradient_checkpointing, seed=run.seed)
    check_head(model)
    if run.train.batching == "packed":
        check_packing(model)
    filters = make_filters(model, terms, _shown_widths(terms, frozen), run.seed)
    model.train()
    train = run.train
    numerics = Numerics(train.clip_norm, PRECISIONS[train.precision], device)

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups = decay_groups(list(parameters), train.weight_decay)
        return torch.optim.AdamW(groups, lr=max(values_of(train.lr)), betas=train.betas, eps=train.eps, fused=True)

    return make_layout(train.layout, StudentModule(model, filters=filters), optimizer, numerics)


def _shown_widths(terms: Sequence[AnyTerm], frozen: Mapping[str, FrozenPlayer]) -> dict[str, dict[Tap, int]]:
    """Widths of all taps that `terms` read, by frozen player."""
    read = [(t.signal, tap) for t in terms if isinstance(t, StatesTerm) for tap in t.objective.taps.teacher]
    return {name: player.widths({tap for signal, tap in read if signal == name}) for name, player in frozen.items()}


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
