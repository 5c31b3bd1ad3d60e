"""The student's weights as a plain Hugging Face model names them: whole, on the CPU, out of any layout, LoRA merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.layouts import Layout
from orchestrator.models import FILTERS

ADAPTED = "base_model.model."
BASE, LORA_A, LORA_B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


@torch.no_grad()
def published_weights(layout: Layout, adapter_scale: float | None) -> dict[str, Tensor]:
    """Names and values on rank 0, nothing elsewhere; `adapter_scale` multiplies the product of a LoRA student's factors. Collective."""
    gathered = layout.gathered()
    own = {name.removeprefix("model."): value for name, value in gathered.items() if not name.startswith(f"{FILTERS}.")}
    return own if adapter_scale is None else _merged(own, adapter_scale)


def _merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """PEFT's names and products turned into those of the model that it adapts."""
    found = {}
    for name, value in weights.items():
        plain = name.removeprefix(ADAPTED)
        if ".lora_" in plain:
            continue
        stem = name.removesuffix(BASE)
        a, b = weights.get(stem + LORA_A), weights.get(stem + LORA_B)
        changed = value if a is None or b is None else value + scale * (b.float() @ a.float()).to(value.dtype)
        found[plain.replace(".base_layer.", ".")] = changed
    return found
