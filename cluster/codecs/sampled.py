"""Draws in a few bits each: sorted ids with a level of log-probability beside each, and no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cluster.codecs.bits import SortedIds, from_bits, to_bits
from cluster.codecs.topk import BLOCK
from cluster.engines import Columns

Floats = NDArray[np.float64]


class SampledCodec:
    """Arrays `packed` (uint8: sorted ids, then the level of each), `range` (float32: log-probability of level 0, and of a step),
    `logprob` (float16, of the label) and, for an exponent other than 1, `weight` (float32: log of the weights' constant).

    A draw is p^e / Z at its id, so its weight p^(1-e) Z / n follows from its log-probability and Z. Decoded draws are in order
    of id. Log-probabilities are off by at most half a step, `range / (2^bits - 1) / 2`, and weights by |1 - e| times that.
    """

    version: ClassVar[int] = 1

    def __init__(self, draws: int, exponent: float, bits: int, vocabulary: int) -> None:
        self._draws, self._exponent, self._bits = draws, exponent, bits
        self._ids = SortedIds(draws, vocabulary)

    @property
    def bytes_per_token(self) -> int:
        return -(-(self._ids.bits + self._draws * self._bits) // 8) + 8 + 2 + (0 if self._exponent == 1 else 4)

    def encode(self, answers: Columns, tokens: int) -> Columns:
        shaped = {n: answers[n].reshape(tokens, self._draws) for n in ("ids", "logprobs", "weights")}
        parts = [self._encode({n: a[s : s + BLOCK] for n, a in shaped.items()}) for s in range(0, max(tokens, 1), BLOCK)]
        found: Columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        with np.errstate(over="ignore"):
            return {**found, "logprob": answers["logprob"].reshape(tokens, 1).astype(np.float16)}

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Columns:
        tokens = len(arrays["packed"])
        parts = [self._decode({n: a[s : s + BLOCK] for n, a in arrays.items()}) for s in range(0, max(tokens, 1), BLOCK)]
        found: Columns = {name: np.concatenate([p[name] for p in parts]).ravel() for name in parts[0]}
        return {**found, "logprob": arrays["logprob"].astype(np.float32).ravel()}

    def _encode(self, answers: Columns) -> Columns:
        logprobs = np.asarray(answers["logprobs"], np.float64)
        ids = np.asarray(answers["ids"], np.int64)
        order = ids.argsort(axis=1, kind="stable")
        top = logprobs.max(1).astype(np.float32)
        step = ((top - logprobs.min(1)) / ((1 << self._bits) - 1)).astype(np.float32)
        levels = np.rint((top[:, None] - logprobs) / np.maximum(step, 1e-30)[:, None])
        levels = np.clip(levels, 0, (1 << self._bits) - 1).astype(np.int64)
        bits = [self._ids.write(np.take_along_axis(ids, order, 1)), to_bits(np.take_along_axis(levels, order, 1), self._bits)]
        found: Columns = {"packed": np.packbits(np.concatenate(bits, 1), axis=1), "range": np.stack([top, step], axis=1)}
        if self._exponent != 1:
            constant = np.log(np.asarray(answers["weights"], np.float64)) - (1 - self._exponent) * logprobs
            found["weight"] = constant.mean(1, keepdims=True).astype(np.float32)
        return found

    def _decode(self, arrays: Columns) -> Columns:
        bits = np.unpackbits(np.asarray(arrays["packed"], np.uint8), axis=1)
        stop = self._ids.bits + self._draws * self._bits
        levels = from_bits(bits[:, self._ids.bits : stop], self._draws, self._bits)
        ends = np.asarray(arrays["range"], np.float32)
        logprobs = ends[:, :1] - levels.astype(np.float32) * ends[:, 1:]
        if self._exponent == 1:
            weights = np.full(logprobs.shape, 1 / self._draws, np.float32)
        else:
            weights = np.exp(np.asarray(arrays["weight"], np.float32) + np.float32(1 - self._exponent) * logprobs)
        return {"ids": self._ids.read(bits[:, : self._ids.bits]).astype(np.int32), "logprobs": logprobs, "weights": weights}
