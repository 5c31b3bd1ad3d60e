"""Pairs: which of the rows that come as chosen and rejected in turn are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.core import Columns, Endpoint
from strategies.objectives.preference import pair_weights
from strategies.stages.judge import PASSING, loss_counts


@dataclass(frozen=True)
class PairWeights:
    """Adds `weights/<term>` (N,) float32 for an objective that compares rows 2i and 2i + 1, as `Rollout(paired=True)` leaves them: 1
    on the first loss token of a chosen row, 0 elsewhere.

    A pair of equal texts says nothing and weighs 0; with `judged`, so does one whose rejected text was not found wrong, because it is
    right or because no verdict was reached. Held-out rows come one by one, and weigh nothing.
    """

    term: str
    judged: bool = False
    """Whether a verifier's verdicts are there (`Reward`)."""

    endpoint = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tokens", "lengths", "loss_mask", "written"} | ({"reward", "judged"} if self.judged else set()))

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({f"weights/{self.term}"})

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        counts, written = loss_counts(columns), columns["written"].astype(bool)
        if not written.any():
            return {**columns, f"weights/{self.term}": np.zeros(int(counts.sum()), dtype=np.float32)}
        if len(written) % 2 or written[::2].any() or not written[1::2].all():
            raise ValueError(
                f"PairWeights: got rows of which {written.astype(int).tolist()} are written; expected given and written in turn"
            )
        tells = self._differ(columns) & self._wrong(columns)
        return {**columns, f"weights/{self.term}": pair_weights(counts) * np.repeat(np.repeat(tells, 2), counts)}

    def _differ(self, columns: Columns) -> NDArray[np.bool_]:
        """Of each pair, `(P,)`, whether its texts do."""
        rows = np.split(columns["tokens"], np.cumsum(columns["lengths"].astype(np.int64))[:-1])
        return np.asarray([not np.array_equal(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)], dtype=bool)

    def _wrong(self, columns: Columns) -> NDArray[np.bool_]:
        """Of each pair, `(P,)`, whether its rejected text is; without a verifier, all are taken to be."""
        if not self.judged:
            return np.ones(len(columns["lengths"]) // 2, dtype=bool)
        return np.asarray(columns["judged"].astype(bool) & (columns["reward"].astype(np.float64) < PASSING))[1::2]
