"""The head's matrix products into memory that is there already.

In float32 on a CPU torch hands products to MKL, which on CPUs of other makers leaves AVX-512 unused; oneDNN, which torch
ships as well, does not. Where that applies, and the operator that torch's own compiler calls is there, it is used: on an
AMD EPYC of two cores 400 instead of 150 Gflop/s. Everywhere else, and with other dtypes, this is `torch.mm`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

TILE_BYTES = 8 << 20
"""Of a product that oneDNN makes at once: it has no `out`, and a larger new tensor would be mapped by the kernel each time."""


def times_transposed(states: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`states (n, D) @ weight (V, D).T + bias (V,)` into `out` `(n, V)`, all of one dtype. Carries no gradient."""
    if not _by_onednn(states):
        return torch.mm(states, weight.T, out=out) if bias is None else torch.addmm(bias, states, weight.T, out=out)
    tile = max(1, TILE_BYTES // (4 * max(1, len(states))))
    for start in range(0, len(weight), tile):
        rows = slice(start, start + tile)
        out[:, rows] = _linear(states, weight[rows], None if bias is None else bias[rows])
    return out


def times(by_logits: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`by_logits (n, V) @ weight (V, D)` into `out` `(n, D)`, all of one dtype. Carries no gradient."""
    if not _by_onednn(by_logits):
        return torch.mm(by_logits, weight, out=out)
    return out.copy_(_linear(by_logits, weight.T, None))


def add_product(into: Tensor, by_logits: Tensor, states: Tensor) -> None:
    """`into (V, D) += by_logits (n, V).T @ states (n, D)`, accumulated in float32 whatever the compute dtype."""
    if states.dtype == torch.float32:
        into.addmm_(by_logits.T, states)
    else:
        into += by_logits.T @ states


def _by_onednn(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() > 0 and _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    usable = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return usable and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return found
