"""The networks inside a training worker: loading, wrapping in a layout, forwards and steps by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from orchestrator.config import RunConfig
from orchestrator.layouts import Layout, Numerics, make_layout
from orchestrator.microbatch import MicroBatch
from orchestrator.models import StudentModule, check_head, check_packing, load_student
from strategies.core import Player, Progress, Term
from strategies.head import TermSums

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_players(run: RunConfig, wanted: Mapping[str, Player], device: torch.device) -> dict[str, Layout]:
    """Every player of the strategy, wrapped in the run's layout on this worker."""
    return {name: _load(run, device) for name in wanted}


def _load(run: RunConfig, device: torch.device) -> Layout:
    model = load_student(run.student, gradient_checkpointing=run.train.gradient_checkpointing, seed=run.seed)
    check_head(model)
    if run.train.batching == "packed":
        check_packing(model)
    model.train()
    train = run.train
    numerics = Numerics(train.clip_norm, PRECISIONS[train.precision], device)

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups = decay_groups(list(parameters), train.weight_decay)
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)

    return make_layout(train.layout, StudentModule(model), optimizer, numerics)


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

    def forward(self, player: str, terms: tuple[Term, ...]) -> TermSums:
        """One forward of `player` through its wrapped module with all `terms` on it."""
        loss, sums = self.layouts[player].module(self.micro, terms, self.scales, self.progress)
        return TermSums(loss=loss, sums={t.name: sums[i] for i, t in enumerate(terms)})
