"""Answers a column an array: as they come, or in half the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cluster.engines import Columns, Request


def rows(column: NDArray[np.generic], tokens: int) -> NDArray[np.generic]:
    """A flat column as `(tokens, w)`; of no tokens w is unknown here and 1."""
    return column.reshape(tokens, -1) if tokens else column.reshape(0, 1)


class ExactCodec:
    """One array a column, of its own dtype: what is decoded is bit for bit what was encoded."""

    version: ClassVar[int] = 1

    def __init__(self, request: Request, vocabulary: int) -> None:
        kept = request.top_k if request.kind == "topk" else request.draws
        own = {"topk": {"ids": kept, "logprobs": kept}, "sampled": {"ids": kept, "logprobs": kept, "weights": kept}}
        self._widths = {**own.get(request.kind, {}), "dense": vocabulary, "logprob": 1}
        wide = {"dense": vocabulary} if request.kind == "dense" else own.get(request.kind, {})
        self._bytes = None if request.kind == "hidden" else 4 * (sum(wide.values()) + 1)

    @property
    def bytes_per_token(self) -> int | None:
        """None for hidden states, whose width only the model knows."""
        return self._bytes

    def encode(self, answers: Columns, tokens: int) -> Columns:
        return {
            n: np.ascontiguousarray(a).reshape(tokens, self._widths[n]) if n in self._widths else rows(a, tokens)
            for n, a in answers.items()
        }

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Columns:
        return {name: np.ascontiguousarray(array).ravel() for name, array in arrays.items()}


class DenseCodec:
    """`dense` as float16, off by 2^-11 of each log-probability; for debugging: 2 bytes times the vocabulary a token."""

    version: ClassVar[int] = 1

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    @property
    def bytes_per_token(self) -> int:
        return 2 * self._vocabulary + 4

    def encode(self, answers: Columns, tokens: int) -> Columns:
        with np.errstate(over="ignore"):
            dense = answers["dense"].reshape(tokens, self._vocabulary).astype(np.float16)
        return {"dense": dense, "logprob": answers["logprob"].reshape(tokens, 1)}

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Columns:
        return {name: array.astype(np.float32).ravel() for name, array in arrays.items()}
