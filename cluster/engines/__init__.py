"""Engines: what answers for an endpoint inside a stage's own process. One file each; `cluster.endpoints` chooses."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[np.generic]]
"""One bundle, or a part of it: named flat arrays. `tokens` (S,) int32, `lengths` (R,) int32, `loss_mask` (S,) uint8."""


class Engine(Protocol):
    """A model that puts numbers on the tokens of one bundle at a time, never mixing two."""

    def score(self, columns: Columns, top_k: int) -> Columns:
        """Numbers for the N = loss_mask.sum() loss tokens, in flat order, each given the prefix of its row.

        `ids` (N*K,) int32 sorted by falling probability, `logprobs` (N*K,) float32 natural logarithms at temperature 1,
        `logprob` (N,) float32 of the token itself (-inf for a token outside the usable vocabulary), `dropped_mass`
        (1,) float32: the largest probability that fell outside the usable vocabulary before renormalisation.
        `ValueError` when `top_k` exceeds that vocabulary or the bundle is malformed.
        """
        ...
