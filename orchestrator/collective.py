"""Small agreements between the ranks of a worker group; the identity when there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(values: Sequence[float]) -> Tensor:
    """The given numbers of every rank, `(world, len(values))` float64."""
    mine = torch.tensor(list(values), dtype=torch.float64)
    if world_size() == 1:
        return mine[None]
    mine = mine.to(_device())
    rows = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def total(values: Tensor) -> Tensor:
    """Sum over ranks, on the CPU."""
    if world_size() == 1:
        return values.cpu()
    summed = values.to(_device(), copy=True)
    dist.all_reduce(summed)
    return summed.cpu()


def _device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
