"""The student's weights as a plain Hugging Face model names them: on the CPU, out of any layout, LoRA merged or apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.adapters import apart, merged, turned
from orchestrator.layouts import Layout
from orchestrator.models import FILTERS


@torch.no_grad()
def published_weights(layout: Layout, adapter_scale: float | None) -> dict[str, Tensor]:
    """Names and values on rank 0, nothing elsewhere; `adapter_scale` multiplies the product of a LoRA student's factors. Collective."""
    own = _own(layout.gathered())
    return own if adapter_scale is None else merged(*apart(own, adapter_scale, turned(layout.module)))


@torch.no_grad()
def published_adapter(layout: Layout, adapter_scale: float) -> dict[str, Tensor]:
    """A LoRA student's factors alone, named as `orchestrator.adapters.apart` does, on rank 0. Collective."""
    return apart(_own(layout.gathered(trained=True)), adapter_scale, turned(layout.module))[1]


@torch.no_grad()
def published_base(layout: Layout) -> dict[str, Tensor]:
    """What a LoRA student adapts, on rank 0. Collective."""
    return apart(_own(layout.gathered()), 1.0)[0]


def _own(gathered: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in gathered.items() if not name.startswith(f"{FILTERS}.")}


@dataclass
class Average:
    """A moving average of the student's weights, in float32 on the CPU: after each step `w + rate (student - w)`, from the student's
    first weights on."""

    rate: float
    weights: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, student: Mapping[str, Tensor]) -> None:
        """Begins as the student is, unless it goes on from a checkpoint."""
        self.weights = self.weights or {name: value.to(torch.float32, copy=True) for name, value in student.items()}

    def follow(self, student: Mapping[str, Tensor]) -> None:
        """Takes in the student after one more step."""
        for name, value in student.items():
            self.weights[name].lerp_(value.float(), self.rate)
