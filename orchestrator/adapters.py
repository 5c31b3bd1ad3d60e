"""LoRA weights apart from those they adapt, and both put together as the plain model has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTED = "base_model.model."
FACTORS = {".lora_A.default.weight": ":A", ".lora_B.default.weight": ":B"}
"""How PEFT's names of the factors of a linear layer end, and ours."""
OTHER = {":A": ":B", ":B": ":A"}


def turned(module: nn.Module) -> frozenset[str]:
    """Which of a model's adapted weights lie as (inputs, outputs), as GPT-2's do, by the plain model's names."""
    layers = (name for name, layer in module.named_modules() if getattr(layer, "fan_in_fan_out", False))
    return frozenset(f"{name.rpartition(ADAPTED)[2]}.weight" for name in layers)


def apart(weights: Mapping[str, Tensor], scale: float, turned: Collection[str] = ()) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights under PEFT's names as (those of the plain model, the adapter). The adapter has `<name of a weight>:A` and
    `<name of a weight>:B`, one of them times `scale` in float32, so that B A is what is added to the weight. Weights that are `turned`
    lie as (inputs, outputs). Weights or adapter may be missing from `weights`, and are then empty.

    `ValueError` for adapter weights that are no factors of a linear layer's.
    """
    base: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for name, value in weights.items():
        plain = name.removeprefix(ADAPTED)
        if ".lora_" not in plain:
            base[plain.replace(".base_layer.", ".")] = value
            continue
        end = next((e for e in FACTORS if plain.endswith(e)), None)
        if end is None:
            raise ValueError(f"adapter weight {plain!r}: got none of {', '.join(FACTORS)}; expected adapters of linear layers only")
        weight, factor = f"{plain.removesuffix(end)}.weight", FACTORS[end]
        scaled = value if factor == ":A" else scale * value.float()
        if weight in turned:  # the transpose of B A is that of A times that of B
            adapter[f"{weight}{OTHER[factor]}"] = scaled.T.contiguous()
        else:
            adapter[f"{weight}{factor}"] = scaled
    return base, adapter


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's weights with the adapter's products added. `ValueError` for a product of a weight that is not there."""
    foreign = sorted({name[:-2] for name in adapter} - set(base))
    if foreign:
        raise ValueError(f"adapter of {foreign[0]!r}: got {len(foreign)} adapted weights that the base lacks; expected its names")

    def changed(name: str, value: Tensor) -> Tensor:
        a, b = adapter.get(f"{name}:A"), adapter.get(f"{name}:B")
        return value if a is None or b is None else value + (b.float() @ a.float()).to(value.dtype)

    return {name: changed(name, value) for name, value in base.items()}
