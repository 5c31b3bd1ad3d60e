"""Layouts: how one trained network is spread over workers. One file each, one mapping, one protocol.

Every layout averages gradients over ranks, so the scales that go into the loss carry the world size. `last` says that a
backward is the step's final one and must synchronise; it is set *before* the forward (DDP decides there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


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

    def held_bytes(self) -> dict[str, int]:
        """Bytes this rank really holds: `parameters`, `optimizer`."""
        ...


_LAYOUTS = {
    "single": "orchestrator.layouts.replicated:Single",
    "ddp": "orchestrator.layouts.replicated:Ddp",
    "fsdp2": "orchestrator.layouts.fsdp2:Fsdp2",
    "deepspeed": "orchestrator.layouts.deepspeed:DeepSpeed",
}


def make_layout(config: LayoutConfig, module: nn.Module, optimizer: OptimizerFactory, numerics: Numerics) -> Layout:
    """Wraps `module` (already on CPU or device, whole on every rank) under the configured layout.

    Packages of a layout are imported only when it is chosen.
    """
    home, _, name = _LAYOUTS[config.type].partition(":")
    layout: Layout = getattr(import_module(home), name)(module, optimizer, numerics, config)
    return layout
