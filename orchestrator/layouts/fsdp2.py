"""Sharded parameters, gradients and optimizer states by torch's `fully_shard` (FSDP2), called directly."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from orchestrator.layouts.replicated import Single


class Fsdp2(Single):
    """One shard per worker; each repeated decoder layer gathers and frees its own parameters.

    Layers go to their device one by one as they are sharded: all of them may be more than it holds.
    """

    def _wrap(self, module: nn.Module) -> nn.Module:
        mesh = init_device_mesh(self.numerics.device.type, (torch.distributed.get_world_size(),))
        compute = self.numerics.precision
        policy = MixedPrecisionPolicy()
        if compute != torch.float32:
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for layer in _repeated_layers(module):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        return module

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def gathered(self, trained: bool = False) -> dict[str, torch.Tensor]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
        weights: dict[str, Any] = get_model_state_dict(self.module, options=options)
        return weights

    def _grad_norm(self) -> torch.Tensor:
        norm = super()._grad_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The members of the network's module lists: its decoder layers."""
    return [layer for part in module.modules() if isinstance(part, nn.ModuleList) for layer in part]
