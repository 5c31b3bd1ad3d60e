"""DeepSpeed, called directly: ZeRO stages 0 to 3, with the optimizer's states in host memory when asked.

The optimizer is the same torch AdamW as under every other layout; DeepSpeed decides where its pieces live.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from orchestrator.config import LayoutConfig
from orchestrator.errors import Refusal
from orchestrator.layouts import Numerics, OptimizerFactory, set_rates, trained_parameters
from orchestrator.layouts.replicated import whole_weights
from orchestrator.layouts.zero import MOMENTS, HeldPiece, flat_weights, held_piece, make_moments, publish_weights, trained


class DeepSpeed:
    """One network under ZeRO.

    Stage 0 keeps whole copies and averages gradients, 1 shards the optimizer, 2 gradients too, 3 weights too. In bfloat16,
    stages 1 to 3 hold bfloat16 weights beside sharded float32 ones, and stage 0 computes under autocast. Vectors, such as
    norms, stay whole on every rank.
    """

    def __init__(self, module: nn.Module, optimizer: OptimizerFactory, numerics: Numerics, config: LayoutConfig):
        if config.offload_optimizer and config.zero_stage == 0:
            do = "Set train.layout.zero_stage=1 or more, or leave the optimizer on the device."
            raise Refusal("train.layout", "offload_optimizer with zero_stage 0", "a stage that shards the optimizer", do)
        self._numerics, self._stage = numerics, config.zero_stage
        exact = [p.data for p in module.parameters()]
        self._adamw = optimizer(trained_parameters(module))
        self._engine = _engine(module, self._adamw, _settings(module, numerics, config), numerics.device)
        self.module: nn.Module = self._engine
        if self._stage:
            make_moments(self._adamw, flat_weights(self._engine.optimizer))
        if self._stage and numerics.precision != torch.float32:
            self._keep_exact(exact)

    def _keep_exact(self, exact: list[Tensor]) -> None:
        """Gives the float32 weights the values they had before DeepSpeed rounded them to the compute dtype."""
        with torch.no_grad():
            for parameter, value in zip(self._engine.module.parameters(), exact, strict=True):
                if parameter.requires_grad:
                    held = held_piece(self._engine.optimizer, parameter)
                    held.of(held.flat).held.copy_(value.flatten().narrow(0, held.start, held.numel))

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        dtype = self._numerics.precision
        with torch.autocast(self._numerics.device.type, dtype, enabled=self._stage == 0 and dtype != torch.float32):
            yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        set_rates(self._adamw, lr)
        if self._stage == 0:
            return self._step_whole()
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else float("inf")

    def _step_whole(self) -> float:
        """Stage 0, for which DeepSpeed neither tells the norm nor skips a step."""
        limit = self._numerics.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_([p for p in self._engine.module.parameters() if p.grad is not None], limit)
        if norm.isfinite():
            self._engine.step()
        self._engine.zero_grad()
        return float(norm)

    def state(self) -> dict[str, Any]:
        if self._stage == 0:
            model, optimizer = get_state_dict(self._engine.module, self._adamw, options=StateDictOptions(ignore_frozen_params=True))
            return {"model": model, "optimizer": optimizer}
        held = self._held()
        moments = {name: {m: h.of(self._adamw.state[h.flat][m]) for m in MOMENTS} for name, h in held.items()}
        steps = [self._adamw.state[flat]["step"] for flat in flat_weights(self._engine.optimizer)]
        weights = {name: h.of(h.flat) for name, h in held.items()}
        return {"model": weights | self._buffers(), "optimizer": {"state": moments, "step": steps[0].detach().cpu().clone()}}

    def load(self, state: dict[str, Any]) -> None:
        if self._stage == 0:
            options = StateDictOptions(ignore_frozen_params=True, strict=False)
            model, optimizer = state["model"], state["optimizer"]
            set_state_dict(self._engine.module, self._adamw, model_state_dict=model, optim_state_dict=optimizer, options=options)
            return
        with torch.no_grad():
            for name, held in self._held().items():
                held.of(held.flat).held.copy_(state["model"][name].held)
                for moment, given in state["optimizer"]["state"][name].items():
                    held.of(self._adamw.state[held.flat][moment]).held.copy_(given.held)
            for flat in flat_weights(self._engine.optimizer):
                self._adamw.state[flat]["step"].copy_(state["optimizer"]["step"])
            for name, buffer in self._buffers().items():
                buffer.copy_(state["model"][name])
        publish_weights(self._engine.optimizer, self._engine.module)

    def _held(self) -> dict[str, HeldPiece]:
        return {name: held_piece(self._engine.optimizer, p) for name, p in trained(self._engine.module)}

    def _buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers, whole on every rank."""
        everything = self._engine.module.state_dict(keep_vars=True)
        return {name: value for name, value in everything.items() if not isinstance(value, nn.Parameter)}

    def gathered(self, trained: bool = False) -> dict[str, Tensor]:
        rank = torch.distributed.get_rank()
        if self._stage < 3:
            held = {} if rank else whole_weights(self._engine.module, trained)
            return {name: value.detach().cpu() for name, value in held.items()}
        import deepspeed

        found: dict[str, Tensor] = {} if rank or trained else dict(self._buffers())
        for name, parameter in ((n, p) for n, p in self._engine.module.named_parameters() if p.requires_grad or not trained):
            with deepspeed.zero.GatheredParameters([parameter]):
                if not rank:
                    found[name] = parameter.detach().cpu().clone()
        return found

    def held_bytes(self) -> dict[str, int]:
        """`optimizer` counts the flat float32 weights too, which ZeRO keeps beside those that the forward reads."""
        parameters = [t for p in self._engine.module.parameters() for t in (p.data, getattr(p, "ds_tensor", None)) if t is not None]
        states = [t for s in self._adamw.state.values() for t in s.values() if isinstance(t, Tensor)]
        flats = flat_weights(self._engine.optimizer) if self._stage else []
        return {"parameters": _storage_bytes(parameters), "optimizer": _storage_bytes([*states, *flats])}


def _storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the memory behind `tensors`, views of one memory counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _settings(module: nn.Module, numerics: Numerics, config: LayoutConfig) -> dict[str, Any]:
    """DeepSpeed's configuration, with everything explicit that it would otherwise choose to change the curve."""
    vectors = (p.numel() for p in module.parameters() if p.ndim < 2)
    zero: dict[str, Any] = {"stage": config.zero_stage, "stage3_param_persistence_threshold": max(vectors, default=0)}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": numerics.device.type == "cuda"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": numerics.clip_norm if config.zero_stage else 0.0,
        "steps_per_print": sys.maxsize,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.zero_stage and numerics.precision != torch.float32:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def _engine(module: nn.Module, adamw: torch.optim.Optimizer, settings: dict[str, Any], device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when DeepSpeed is imported; its own guess warns on a CPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    with redirect_stdout(io.StringIO()):  # it prints memory statistics and what it has compiled
        import deepspeed

        engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=settings, dist_init_required=False)
    return engine
