"""The top-k answers of several teachers on the same ids, so that they can be blended."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from strategies.core import Columns, Endpoint, Strategy

REST_FLOOR = 1e-9
"""Least probability of the rest."""


@dataclass(frozen=True)
class SharedSupport:
    """Top-k answers of several members on the same ids, so that they can be blended: those of the first, then of the others, each id
    once, then the lowest ids that nobody named. What a member did not name gets an even part of its rest.

    Adds `<prefix><member>/ids` and `<prefix><member>/logprobs` (N*M,), M being the sum of what the members keep, or all ids there are.
    """

    members: tuple[str, ...]
    prefix: str
    vocabulary: int | None = None
    """Ids, from 0, that members answer about, which whoever runs the strategy knows; else up to the highest that is named."""

    endpoint = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(f"{m}/{c}" for m in self.members for c in ("ids", "logprobs", "logprob"))

    @property
    def adds(self) -> frozenset[str]:
        return frozenset(f"{self.prefix}{m}/{c}" for m in self.members for c in ("ids", "logprobs"))

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        tokens = len(columns[f"{self.members[0]}/logprob"])
        named = [columns[f"{m}/ids"].reshape(tokens, -1).astype(np.int64) for m in self.members]
        kept = np.concatenate(named, -1)
        vocabulary = self.vocabulary or int(kept.max(initial=0)) + 1
        ids = union(kept, min(kept.shape[-1], vocabulary))
        found: Columns = {}
        for member, own in zip(self.members, named, strict=True):
            logprobs = columns[f"{member}/logprobs"].reshape(own.shape)
            found[f"{self.prefix}{member}/ids"] = ids.astype(np.int32).ravel()
            found[f"{self.prefix}{member}/logprobs"] = on_support(ids, own, logprobs, vocabulary).astype(np.float32).ravel()
        return {**columns, **found}


def union(ids: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The first `most` different ids of each row of `ids` `(N, M)`, in their order, filled with the lowest others: `(N, most)`."""
    candidates = np.concatenate([ids, np.broadcast_to(np.arange(most), (len(ids), most))], -1)
    order = np.argsort(candidates, -1, kind="stable")
    ascending = np.take_along_axis(candidates, order, -1)
    new = np.concatenate([np.ones((len(ids), 1), bool), np.diff(ascending, axis=-1) != 0], -1)
    first = np.zeros_like(new)
    np.put_along_axis(first, order, new, -1)
    return candidates[first & (first.cumsum(-1) <= most)].reshape(len(ids), most)


def on_support(ids: NDArray[np.int64], own: NDArray[np.int64], logprobs: NDArray[np.generic], vocabulary: int) -> NDArray[np.float64]:
    """Log-probabilities `(N, M)` of `ids` `(N, M)` for one who knows those of `own` `(N, K)` and has the rest spread evenly over all
    other ids."""
    known = logprobs.astype(np.float64)
    rest = np.maximum(1.0 - np.exp(known).sum(-1, keepdims=True), REST_FLOOR)
    unknown = np.log(rest / max(1, vocabulary - own.shape[-1]))
    order = np.argsort(own, -1)
    offsets = np.arange(len(ids))[:, None] * (vocabulary + 1)
    keys = (np.take_along_axis(own, order, -1) + offsets).ravel()
    wanted = ids + offsets
    at = np.minimum(np.searchsorted(keys, wanted), max(0, keys.size - 1))
    values = np.take_along_axis(known, order, -1).ravel()
    return np.where(keys[at] == wanted, values[at], unknown) if keys.size else np.zeros(ids.shape)


def with_vocabulary(strategy: Strategy, vocabulary: int) -> Strategy:
    """The strategy, whose stages that blend know how many ids there are."""
    stages = tuple(replace(s, vocabulary=vocabulary) if isinstance(s, SharedSupport) else s for s in strategy.stages)
    return replace(strategy, stages=stages)
