"""Top-k answers in a few bits an id: Elias-Fano ids by rank group, few-bit log-probabilities, masses kept exactly enough.

What a teacher's top-k loses is dominated by the tail beyond k, so bits go to more ids rather than to finer numbers. The mass of
the tail, and the share of every group in what the groups before it left, are stored on their own (16 bits each, `Shares`), and
log-probabilities within a group are made to add up to them: quantisation never moves mass between groups or into the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cluster.codecs.bits import Bits, SortedIds, from_bits, to_bits
from cluster.codecs.groups import Group
from cluster.engines import Columns

FLOOR = -32.0
"""Log-probabilities below it are stored as it: 1e-14."""
SHARE_LOW, SHARE_STEP, WHOLE = -24.0, 1.0 / 1024, 65535
"""A share s is stored as `(logit(s) - SHARE_LOW) / SHARE_STEP`: s and 1 - s both to 5e-4 of themselves. `WHOLE` is s = 1."""
STEP_TOP, STEPS_PER_OCTAVE = 5, 16
"""A step of log-probability is `2^(STEP_TOP - code / STEPS_PER_OCTAVE)`, from 32 down to 5e-4; of equal ones every level is 0."""
BLOCK = 2048
"""Tokens coded at a time: their bits, one a byte, stay in the cache."""

Floats = NDArray[np.float64]


class TopKCodec:
    """Arrays `packed` (uint8: ids and levels of all groups), `shares` (uint16: of the kept ids, then of every group but the last
    in what is left), `steps` (uint8, of every group with levels), `logprob` (float16, of the label).

    Decoded, `ids` are the encoded set; `logprobs` are off by at most a step of their group (`range / 2^bits`, 4.5 % more for the
    step's own rounding, at least 5e-4) and 1e-3 besides, above FLOOR; they are sorted, so that ids may change places within their group.
    """

    version: ClassVar[int] = 1

    def __init__(self, groups: tuple[Group, ...], vocabulary: int) -> None:
        self._groups, self._vocabulary = groups, vocabulary
        self._k = sum(g.ids for g in groups)
        self._ids = [SortedIds(g.ids, vocabulary) for g in groups]
        self._stepped = [g for g, group in enumerate(groups) if group.bits]
        starts = np.cumsum([0, *(g.ids for g in groups)]).tolist()
        self._ranks = [slice(a, b) for a, b in pairwise(starts)]

    @property
    def _bits(self) -> int:
        return sum(ids.bits + g.ids * g.bits for ids, g in zip(self._ids, self._groups, strict=True))

    @property
    def bytes_per_token(self) -> int:
        return -(-self._bits // 8) + 2 * len(self._groups) + len(self._stepped) + 2

    def encode(self, answers: Columns, tokens: int) -> dict[str, NDArray[np.generic]]:
        ids = answers["ids"].reshape(tokens, self._k)
        logprobs = answers["logprobs"].reshape(tokens, self._k)
        starts = range(0, max(tokens, 1), BLOCK)
        parts = [self._encode(ids[s : s + BLOCK].astype(np.int64), logprobs[s : s + BLOCK].astype(np.float64)) for s in starts]
        found = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        with np.errstate(over="ignore"):
            return {**found, "logprob": answers["logprob"].reshape(tokens, 1).astype(np.float16)}

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Columns:
        tokens = len(arrays["packed"])
        parts = [self._decode({n: a[s : s + BLOCK] for n, a in arrays.items()}) for s in range(0, max(tokens, 1), BLOCK)]
        found: Columns = {name: np.concatenate([p[name] for p in parts]).ravel() for name in parts[0]}
        return {**found, "logprob": arrays["logprob"].astype(np.float32).ravel()}

    def _encode(self, ids: NDArray[np.int64], logprobs: Floats) -> dict[str, NDArray[np.generic]]:
        logprobs = np.clip(logprobs, FLOOR, 0.0)
        bits: list[Bits] = []
        steps = np.empty((len(ids), len(self._stepped)), np.uint8)
        for place, (group, code) in enumerate(zip(self._groups, self._ids, strict=True)):
            own, falling = ids[:, self._ranks[place]], logprobs[:, self._ranks[place]]
            order = own.argsort(axis=1)
            bits.append(code.write(np.take_along_axis(own, order, 1)))
            if group.bits:
                codes, step = _step(falling, group.bits)
                steps[:, self._stepped.index(place)] = codes
                level = np.minimum((falling[:, :1] - falling) / step[:, None], (1 << group.bits) - 1).astype(np.int64)
                bits.append(to_bits(np.take_along_axis(level, order, 1), group.bits))
        return {"packed": np.packbits(np.concatenate(bits, axis=1), axis=1), "shares": self._shares(logprobs), "steps": steps}

    def _shares(self, logprobs: Floats) -> NDArray[np.uint16]:
        """`(N, G)`: the kept ids' share in everything, then each group's in itself and the groups after it."""
        masses = np.stack([np.exp(logprobs[:, r]).sum(1) for r in self._ranks], axis=1)
        left = masses[:, ::-1].cumsum(1)[:, ::-1]
        kept = left[:, :1]
        tail = np.maximum(1.0 - kept, 0.0) if self._k < self._vocabulary else np.zeros_like(kept)
        return _share_codes(np.concatenate([kept, masses[:, :-1]], 1), np.concatenate([tail, left[:, 1:]], 1))

    def _decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Columns:
        bits = np.unpackbits(np.asarray(arrays["packed"], np.uint8), axis=1)
        steps = _step_sizes(np.asarray(arrays["steps"], np.uint8))
        masses = _log_masses(np.asarray(arrays["shares"], np.uint16))
        ids, logprobs, at = [], [], 0
        for place, (group, code) in enumerate(zip(self._groups, self._ids, strict=True)):
            ids.append(code.read(bits[:, at : at + code.bits]))
            at += code.bits
            fall = np.zeros(ids[-1].shape, np.float32)
            if group.bits:
                level = from_bits(bits[:, at : at + group.ids * group.bits], group.ids, group.bits)
                at += group.ids * group.bits
                fall = level.astype(np.float32) * -steps[:, [self._stepped.index(place)]]
            offset = masses[:, place] - np.log(np.exp(fall).sum(1, dtype=np.float32))
            logprobs.append(fall + offset[:, None].astype(np.float32))
        return _sorted(np.concatenate(ids, 1), np.concatenate(logprobs, 1))


def _step(falling: Floats, bits: int) -> tuple[NDArray[np.uint8], Floats]:
    """Codes and sizes of steps, `(N,)` each, of which `2^bits` span each row's range."""
    wanted = np.maximum((falling[:, 0] - falling[:, -1]) / (1 << bits), 1e-9)
    codes = np.floor((STEP_TOP - np.log2(wanted)) * STEPS_PER_OCTAVE)  # down: the steps must span the range
    codes = np.clip(codes, 0, 255).astype(np.uint8)
    return codes, _step_sizes(codes).astype(np.float64)


def _step_sizes(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(np.exp2(STEP_TOP - codes.astype(np.float32) / STEPS_PER_OCTAVE), np.float32)


def _share_codes(own: Floats, rest: Floats) -> NDArray[np.uint16]:
    with np.errstate(divide="ignore"):
        logit = np.log(own) - np.log(rest)
    return np.clip(np.round((logit - SHARE_LOW) / SHARE_STEP), 0, WHOLE).astype(np.uint16)


def _log_masses(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """`(N, G)` log masses of the groups, of what `TopKCodec._shares` stored."""
    logit = codes.astype(np.float64) * SHARE_STEP + SHARE_LOW
    own, rest = -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
    own = np.where(codes == WHOLE, 0.0, own)
    before = own[:, :1] + np.cumsum(np.concatenate([np.zeros((len(codes), 1)), rest[:, 1:]], 1), axis=1)
    last = np.zeros((len(codes), 1))
    return np.asarray(before + np.concatenate([own[:, 1:], last], 1), np.float32)


def _sorted(ids: NDArray[np.int64], logprobs: NDArray[np.float32]) -> Columns:
    """Rows by falling log-probability, equal ones by rising id: one sort of whole numbers, as -log p is positive."""
    keys = np.maximum(-logprobs, np.float32(0)).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys = np.sort(keys | ids.astype(np.uint64), axis=1)
    return {"ids": (keys & np.uint64(0xFFFFFFFF)).astype(np.int32), "logprobs": -(keys >> np.uint64(32)).astype(np.uint32).view(np.float32)}
