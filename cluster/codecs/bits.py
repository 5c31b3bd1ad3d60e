"""Numbers as bits: fixed widths, and Elias-Fano for sorted ids. Everything here is one bit a byte, `(N, B)` uint8 of 0 and 1;
`np.packbits` makes bytes of it at the end, so that only the last byte of a token is padded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint8]


def to_bits(values: NDArray[np.int64], width: int) -> Bits:
    """`(N, n)` numbers in [0, 2^width), width at most 32, as `(N, n * width)`, the highest bit first."""
    dtype, whole = (">u2", 16) if width <= 16 else (">u4", 32)
    octets = values.astype(dtype).view(np.uint8).reshape(*values.shape, whole // 8)
    return np.unpackbits(octets, axis=-1)[..., whole - width :].reshape(len(values), values.shape[1] * width)


def from_bits(bits: Bits, count: int, width: int) -> NDArray[np.int64]:
    """The `(N, count)` numbers of `to_bits`."""
    dtype, whole = (">u2", 16) if width <= 16 else (">u4", 32)
    padded = np.zeros((len(bits), count, whole), np.uint8)
    padded[..., whole - width :] = bits.reshape(len(bits), count, width)
    return np.packbits(padded, axis=-1).view(dtype)[..., 0].astype(np.int64)


class SortedIds:
    """Elias-Fano (Elias 1974, Fano 1971): `count` rising ids below `universe` in about `2 + log2(universe / count)` bits each.

    The low bits of an id are written as they are; its high part h, the i-th of the row, is a one at place h + i. Equal ids are allowed.
    """

    def __init__(self, count: int, universe: int) -> None:
        self._count = count
        sizes = [count * low + self._high_bits(universe, low) for low in range(max(universe - 1, 0).bit_length() + 1)]
        self._low = sizes.index(min(sizes))
        self._high = self._high_bits(universe, self._low)
        self.bits = sizes[self._low]

    def _high_bits(self, universe: int, low: int) -> int:
        """Length of the unary part; none where every high part is 0."""
        most = max(universe - 1, 0) >> low
        return self._count + most if most else 0

    def write(self, ids: NDArray[np.int64]) -> Bits:
        """`(N, count)` rising along the row to `(N, bits)`."""
        low = to_bits(ids & ((1 << self._low) - 1), self._low)
        if not self._high:
            return low
        high = np.zeros((len(ids), self._high), np.uint8)
        np.put_along_axis(high, (ids >> self._low) + np.arange(self._count), 1, axis=1)
        return np.concatenate([low, high], axis=1)

    def read(self, bits: Bits) -> NDArray[np.int64]:
        """The `(N, count)` ids of `write`."""
        low = from_bits(bits[:, : self._count * self._low], self._count, self._low)
        if not self._high:
            return low
        places = np.flatnonzero(bits[:, self._count * self._low :]).reshape(len(bits), self._count)
        high = places - np.arange(len(bits))[:, None] * self._high - np.arange(self._count)
        return (high << self._low) | low
