"""What a rank holds under ZeRO 1 to 3: float32 pieces of every trained parameter and of its AdamW moments.

Read through one view, `HeldPiece`, whatever the stage, and saved as `Piece`s of flat parameters, so that a checkpoint fits any
world size. DeepSpeed's own checkpoints do not resume at another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(Tensor):
    """One rank's stretch of a flat tensor that all ranks hold together, as torch.distributed.checkpoint saves and fills it.

    Stretches may be uneven or empty. No arithmetic: `held` is the plain tensor, `(numel,)`, written in place by a load.
    """

    held: Tensor
    start: int

    @staticmethod
    def __new__(cls, held: Tensor, start: int, size: int) -> Piece:
        """`held` are the elements from `start` of a flat tensor of `size` elements."""
        made: Piece = Tensor._make_wrapper_subclass(cls, torch.Size([size]), dtype=held.dtype, device=held.device)
        made.held, made.start = held, start
        return made

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not len(self.held):
            return []
        return [ChunkStorageMetadata(torch.Size([self.start]), self.held.size())]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.held)
        return [
            WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.size()))
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a Piece is only saved and loaded, and {func} was called on one")


@dataclass(frozen=True)
class HeldPiece:
    """This rank's stretch of one parameter, inside the flat float32 tensor that AdamW steps."""

    flat: Tensor
    """What AdamW's state is keyed by."""
    at: int
    """Where the stretch begins in `flat`."""
    numel: int
    start: int
    """Where the stretch begins in the flattened parameter."""
    size: int
    """Elements of the whole parameter."""

    def of(self, flat: Tensor) -> Piece:
        """The stretch of `flat`, the weights or a moment of theirs."""
        return Piece(flat.detach().narrow(0, self.at, self.numel), self.start, self.size)


def flat_weights(optimizer: Any) -> list[Tensor]:
    """The flat float32 tensors that AdamW steps on this rank."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        found: Sequence[Tensor] | None = getattr(optimizer, name, None)  # ZeRO 3; ZeRO 1 and 2; ZeRO 1 in bfloat16
        if found is not None:
            return list(found)
    raise TypeError(f"{type(optimizer).__name__}: got a DeepSpeed optimizer without flat float32 weights; expected ZeRO 1, 2 or 3")


def held_piece(optimizer: Any, parameter: nn.Parameter) -> HeldPiece:
    """Where this rank keeps its part of `parameter`."""
    flats = flat_weights(optimizer)
    shape: Any = parameter
    if hasattr(parameter, "ds_id"):
        group, at, held = optimizer.grad_position[optimizer.get_param_id(parameter)]
        size = int(shape.ds_numel)
        start = min(size, held * optimizer._get_param_partition_rank(parameter))
        return HeldPiece(flats[group], at, min(held, size - start), start, size)
    mapping = shape._hp_mapping
    if mapping is None:
        return HeldPiece(flats[0], 0, 0, 0, parameter.numel())
    inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
    return HeldPiece(flats[mapping.param_group_index], inside.start, inside.numel, whole.start, parameter.numel())


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trained parameters under every name they have: a tied head comes twice, as in other layouts' states."""
    return ((n, p) for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad)


def make_moments(adamw: torch.optim.Optimizer, flats: list[Tensor]) -> None:
    """AdamW's state for weights that it has not stepped yet, as its first step makes it."""
    for flat in flats:
        if not adamw.state[flat]:
            adamw.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device)}
            adamw.state[flat] |= {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}


@torch.no_grad()
def publish_weights(optimizer: Any, module: nn.Module) -> None:
    """Copies the float32 weights into those that the forward reads. Collective."""
    if not hasattr(optimizer, "fp16_groups"):
        optimizer.update_lp_params()
        return
    for parameter in (p for p in module.parameters() if p.requires_grad):
        held = held_piece(optimizer, parameter)
        shard: Any = parameter
        shard.ds_tensor[: held.numel].copy_(held.flat.narrow(0, held.at, held.numel))
    whole = optimizer.persistent_parameters
    if whole:
        whole[0].partition(whole)
        whole[0].all_gather(whole)
