"""DistillKit's published top-k scheme, written from its description: what our codecs are measured against.

Ids bit-packed in rank order at ceil(log2 V) bits; the first `exact` log-probabilities in a 16-bit float; the others as float32
least-squares coefficients of powers of rank and of its square root. Its README (github.com/arcee-ai/DistillKit, 2026-08)
recommends k = 128, 16 exact and powers 0 to 4 with the root, and as budget k = 50, 1 exact and powers 0, 1 with the root: 344
and 127 bytes at V = 151,936. It stores no log-probability of the label. Where the description leaves a choice (whether ranks
count from 0 or 1, bfloat16 or float16 for the exact ones), all are measured and the best is what is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Peer:
    k: int
    exact: int
    powers: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    """Of the exact ones; the README's."""
    first: int = 0
    """Rank of the first log-probability that is fitted."""

    def bytes_per_token(self, vocabulary: int) -> int:
        ids = -(-self.k * (vocabulary - 1).bit_length() // 8)
        return ids + 2 * self.exact + 4 * (len(self.powers) + 1)

    def round_trip(self, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(N, k)` falling log-probabilities as they come back."""
        exact, rest = logprobs[:, : self.exact], logprobs[:, self.exact :].astype(np.float64)
        ranks = np.arange(self.first, self.first + rest.shape[1], dtype=np.float64)
        terms = np.stack([*(ranks**p for p in self.powers), np.sqrt(ranks)], axis=1)
        coefficients = np.linalg.lstsq(terms / np.abs(terms).max(0), rest.T, rcond=None)[0] / np.abs(terms).max(0)[:, None]
        fitted = (terms @ coefficients.astype(np.float32).astype(np.float64)).T
        kept = torch.from_numpy(exact.copy()).to(self.dtype).float().numpy()
        return np.concatenate([kept, np.minimum(fitted, 0.0).astype(np.float32)], axis=1)


def readings(setting: Peer) -> list[Peer]:
    """The same scheme with every choice that its description leaves open."""
    return [Peer(setting.k, setting.exact, setting.powers, d, f) for d, f in product((torch.bfloat16, torch.float16), (0, 1))]


RECOMMENDED = Peer(128, 16, (0, 1, 2, 3, 4))
BUDGET = Peer(50, 1, (0, 1))
