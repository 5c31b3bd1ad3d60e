"""Whole copies of the network: `single` on one worker, `ddp` on several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from orchestrator.config import LayoutConfig
from orchestrator.layouts import Numerics, OptimizerFactory, set_rates, trained_parameters

_OPTIONS = StateDictOptions(ignore_frozen_params=True)


class Single:
    """One worker holds everything; also the base of layouts whose optimizer is a plain torch one."""

    def __init__(self, module: nn.Module, optimizer: OptimizerFactory, numerics: Numerics, config: LayoutConfig):
        self.numerics = numerics
        self.module = self._wrap(module)
        self.optimizer = optimizer(trained_parameters(self.module))

    def _wrap(self, module: nn.Module) -> nn.Module:
        """The network on its device, as it is trained."""
        return module.to(self.numerics.device)

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        device, dtype = self.numerics.device.type, self.numerics.precision
        with self._synchronised(last), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            yield

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        norm = self._grad_norm()
        if norm.isfinite():
            set_rates(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _grad_norm(self) -> torch.Tensor:
        limit = self.numerics.clip_norm or float("inf")
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, limit)

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer, options=_OPTIONS)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )

    def gathered(self, trained: bool = False) -> dict[str, torch.Tensor]:
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return {}
        whole = self.module.module if isinstance(self.module, DistributedDataParallel) else self.module
        return {name: value.detach().cpu() for name, value in whole_weights(whole, trained).items()}

    def held_bytes(self) -> dict[str, int]:
        states = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return {"parameters": _local_bytes(list(self.module.parameters())), "optimizer": _local_bytes(states)}


class Ddp(Single):
    """A copy on every worker, gradients averaged by `DistributedDataParallel`."""

    def _wrap(self, module: nn.Module) -> nn.Module:
        on = self.numerics.device
        return DistributedDataParallel(module.to(on), device_ids=[on.index] if on.type == "cuda" else None)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.module, DistributedDataParallel)
        return nullcontext() if last else self.module.no_sync()


def whole_weights(module: nn.Module, trained: bool) -> dict[str, torch.Tensor]:
    """The state of a module that lies here whole, or its `trained` parameters under every name they have."""
    if not trained:
        return module.state_dict()
    return {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}


def _local_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the parts of `tensors` that live on this rank."""
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)
