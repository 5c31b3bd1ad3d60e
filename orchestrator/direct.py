"""Weights that travel from process to process, past Ray's object store (Ray Direct Transport, alpha)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True)
class Packed:
    """Tensors as one. Ray remembers some data about every tensor of every version for as long as a process lives."""

    numbers: Tensor
    """`(B,)` uint8."""
    layout: Sequence[tuple[str, torch.dtype, torch.Size]]
    """Name, dtype and shape of each, in their order in `numbers`."""

    def unpacked(self) -> dict[str, Tensor]:
        """The tensors, which share the memory of `numbers`."""
        sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in self.layout]
        parts = self.numbers.split(sizes)
        return {name: part.view(dtype).view(shape) for (name, dtype, shape), part in zip(self.layout, parts, strict=True)}


def packed(weights: Mapping[str, Tensor]) -> Packed:
    """A copy of the weights, the widest dtypes first, so that each lies where its dtype may."""
    ordered = sorted(weights.items(), key=lambda item: -item[1].element_size())
    numbers = torch.cat([torch.zeros(0, dtype=torch.uint8), *(v.contiguous().view(-1).view(torch.uint8) for _, v in ordered)])
    return Packed(numbers, [(name, value.dtype, value.shape) for name, value in ordered])


def sent(weights: Mapping[str, Tensor], transport: str) -> Any:
    """A reference to the weights, which stay with this process until someone takes them by one-sided `transport`."""
    return ray.put(packed(weights), _tensor_transport=transport)
