"""Hidden states in one byte a number: int8 with a scale for every block of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.codecs.exact import rows
from cluster.engines import Columns

MOST = 127
SMALLEST = float(np.finfo(np.float16).tiny)
"""Least scale: numbers of a block that are all below half of it become 0."""
Floats = NDArray[np.float32]


class HiddenCodec:
    """Arrays `float32` or `bfloat16` (int8, named after what was encoded and is decoded) and `scales` (float16, one per `block`
    numbers, the last block of a token as short as it must be).

    A number is off by at most half a scale and the rounding of its dtype, where the scale is a 127th of the block's
    largest magnitude to 0.05 %. Magnitudes up to 8 million; `ValueError` beyond and where a number is not finite.
    """

    version: ClassVar[int] = 1
    bytes_per_token: ClassVar[None] = None
    """Only the model knows the width D: D + 2 ceil(D / block) bytes."""

    def __init__(self, block: int) -> None:
        self._block = block

    def encode(self, answers: Columns, tokens: int) -> Columns:
        column = answers["hidden"]
        kind = "bfloat16" if column.dtype == np.int16 else "float32"
        states = np.asarray(rows(_as_floats(column), tokens), np.float32)
        scales = _scales(np.maximum.reduceat(np.abs(states), np.arange(0, states.shape[1], self._block), axis=1))
        levels = np.rint(states / self._spread(scales, states.shape[1]))
        return {kind: levels.astype(np.int8), "scales": scales}

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Columns:
        kind = "bfloat16" if "bfloat16" in arrays else "float32"
        levels = np.asarray(arrays[kind], np.float32)
        states = levels * self._spread(np.asarray(arrays["scales"], np.float16), levels.shape[1])
        if kind == "float32":
            return {"hidden": states.ravel()}
        return {"hidden": torch.from_numpy(states).bfloat16().view(torch.int16).numpy().ravel()}

    def _spread(self, scales: NDArray[np.float16], width: int) -> Floats:
        """`(N, D)` scale of every number."""
        return scales.astype(np.float32).repeat(self._block, axis=1)[:, :width]


def _as_floats(column: NDArray[np.generic]) -> Floats:
    if column.dtype != np.int16:
        return np.asarray(column, np.float32)
    return (np.asarray(column).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _scales(largest: Floats) -> NDArray[np.float16]:
    """The float16 nearest to a 127th of each block's `largest` magnitude."""
    wanted = np.maximum(largest / MOST, SMALLEST)
    if not np.isfinite(wanted).all() or (wanted > np.finfo(np.float16).max).any():
        raise ValueError(f"hidden states: got a magnitude of {largest.max():g}; expected at most {MOST * 65504:g}, or the exact codec")
    return wanted.astype(np.float16)  # rounded down by 2^-11 at most: the largest level is 127.06, and rounds to 127
