"""LoRA weights apart from those they adapt, and both put together as the plain model has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ADAPTED = "base_model.model."
FACTORS = {".lora_A.default.weight": ":A", ".lora_B.default.weight": ":B"}
"""How PEFT's names of the factors of a linear layer end, and ours."""


def apart(weights: Mapping[str, Tensor], scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights under PEFT's names as (those of the plain model, the adapter). The adapter has `<name of a weight>:A` and, times
    `scale` in float32, `<name of a weight>:B`. Either may be missing from `weights`, and is then empty.

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
        adapter[f"{plain.removesuffix(end)}.weight{FACTORS[end]}"] = value if FACTORS[end] == ":A" else scale * value.float()
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
