"""Layouts: how one trained network is spread over workers. One file each, one mapping, one protocol.

Every layout averages gradients over ranks, so the scales that go into the loss carry the world size. `last` says that a
backward is the step's final one and must synchronise; it is set *before* the forward (DDP decides there).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn

from orchestrator.config import LayoutConfig


@dataclass(frozen=True)
class Numerics:
    """What a layout must know of the optimisation besides the network."""

    clip_norm: float
    """Largest gradient norm over all ranks; 0 never clips."""
    precision: torch.dtype
    """Compute dtype of forward and backward."""
    device: torch.device


OptimizerFactory = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of trained parameters by name."""
LR_SHARE = "lr_share"
"""In a group of parameters, its learning rate as a share of the one that a layout is told; 1 where it is absent."""


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group of parameters its learning rate, where that of most is `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_SHARE, 1.0)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer is made of."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Layout(Protocol):
    """One trained network under one layout."""

    module: nn.Module
    """The wrapped network; call this, never what is inside it."""

    def micro(self, last: bool) -> AbstractContextManager[None]:
        """Entered around one forward and its backward."""
        ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self, lr: float) -> float:
        """Clip, step at learning rate `lr`, zero; returns the gradient norm before clipping. A norm that is not
        finite skips the step on every rank and is returned as it is."""
        ...

    def state(self) -> dict[str, Any]:
        """Model and optimizer as a tree that torch.distributed.checkpoint saves, equal on any world size."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Takes the tree that `state` describes, filled in by torch.distributed.checkpoint."""
        ...

    def gathered(self, trained: bool = False) -> dict[str, torch.Tensor]:
        """Every weight of the wrapped module by name, or the `trained` ones alone, whole and on the CPU, on rank 0; nothing on others.
        Collective. What comes may be the live weights themselves: copy before the next step."""
        ...

    def held_bytes(self) -> dict[str, int]:
        """Bytes this rank really holds: `parameters`, `optimizer`."""
        ...


@dataclass(frozen=True)
class Held:
    """What one rank holds, as shares of the whole network's numbers."""

    weights: float = 1.0
    gradients: float = 1.0
    moments: float = 1.0
    """Each of AdamW's two."""
    buckets: float = 0.0
    """Second copies of gradients, in which they travel."""
    exact: float = 0.0
    """float32 weights kept by the optimizer beside those that the forward reads."""


@dataclass(frozen=True)
class LayoutFacts:
    """What is known of a layout before it is chosen; importing it needs none of its packages."""

    home: str
    """`module:class`."""
    held: Callable[[LayoutConfig, int], Held] = lambda config, world: Held()
    """What a rank holds, given the settings and the number of ranks."""
    package: str | None = None
    """A package that only this layout needs."""
    compiles_on_cpu: bool = False
    """Whether it builds a C++ extension when it runs without a GPU."""
    one_worker: bool = False
    settings: frozenset[str] = frozenset()
    """Settings of `LayoutConfig` that it reads."""
    resumes_any_world: bool = True
    """Whether a checkpoint loads at another number of workers."""
    elastic: bool = False
    """Whether a group may grow and shrink while it runs, as tests on a cluster show."""


def _sharded(config: LayoutConfig, world: int) -> Held:
    return Held(weights=1 / world, gradients=1 / world, moments=1 / world)


def _zero(config: LayoutConfig, world: int) -> Held:
    """ZeRO 1 shards the optimizer, 2 gradients too, 3 weights too; every stage above 0 keeps exact weights of its own."""
    stage = config.zero_stage
    own = 1 / world
    return Held(
        weights=own if stage >= 3 else 1.0,
        gradients=own if stage >= 2 else 1.0,
        moments=own if stage >= 1 else 1.0,
        exact=own if stage >= 1 else 0.0,
    )


_LAYOUTS = {
    "single": LayoutFacts("orchestrator.layouts.replicated:Single", one_worker=True),
    "ddp": LayoutFacts("orchestrator.layouts.replicated:Ddp", held=lambda config, world: Held(buckets=1.0), elastic=True),
    "fsdp2": LayoutFacts("orchestrator.layouts.fsdp2:Fsdp2", held=_sharded, elastic=True),
    "deepspeed": LayoutFacts(
        "orchestrator.layouts.deepspeed:DeepSpeed",
        held=_zero,
        package="deepspeed",
        compiles_on_cpu=True,
        settings=frozenset({"zero_stage", "offload_optimizer"}),
    ),
}


def layout_facts(config: LayoutConfig) -> LayoutFacts:
    """Facts of the configured layout."""
    return _LAYOUTS[config.type]


def layouts_with(setting: str) -> list[str]:
    """Layouts that read a setting of `LayoutConfig`."""
    return [name for name, facts in _LAYOUTS.items() if setting in facts.settings]


def make_layout(config: LayoutConfig, module: nn.Module, optimizer: OptimizerFactory, numerics: Numerics) -> Layout:
    """Wraps `module` (already on CPU or device, whole on every rank) under the configured layout.

    Packages of a layout are imported only when it is chosen.
    """
    # FSDP2 and DeepSpeed call these themselves, at every step.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    home, _, name = layout_facts(config).home.partition(":")
    layout: Layout = getattr(import_module(home), name)(module, optimizer, numerics, config)
    return layout
