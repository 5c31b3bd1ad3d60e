"""Pacing: prompts that the student sometimes solves count most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.core import Columns, Endpoint
from strategies.stages.judge import PASSING, groups, loss_counts


def paced_weight(
    passes: float | NDArray[np.floating], samples: float | NDArray[np.floating], a: float = 1.0, b: float = 1.0
) -> NDArray[np.float64]:
    """w = pi^a (1 - pi)^b with pi = (s + 1/2) / (R + 1), for s passes of R samples: PACED (arXiv:2603.11178), whose pass rate is s / R.

    The half pass that is added keeps w above 0 where all samples pass or none does. Largest where pi = a / (a + b).
    """
    rate = (np.asarray(passes, dtype=np.float64) + 0.5) / (np.asarray(samples, dtype=np.float64) + 1.0)
    return np.asarray(rate**a * (1.0 - rate) ** b)


@dataclass(frozen=True)
class PassRateWeight:
    """Multiplies `weights/<term>` (N,) float32, 1 for every loss token where absent, by the `paced_weight` of the group over its
    largest value, which lies in (0, 1], on the rows whose `written` is 1.

    Groups are those of `GroupAdvantage`, and so are passes and samples; a group without verdicts has a rate of 1/2. Rows that
    nobody wrote keep their weights.
    """

    terms: tuple[str, ...]
    a: float = 1.0
    """How much failing prompts are held back; above 0."""
    b: float = 1.0
    """How much solved prompts are held back; above 0."""

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0):
            raise ValueError(f"PassRateWeight: got a = {self.a:g} and b = {self.b:g}; expected both above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "judged", "written", "row_id", "lengths", "loss_mask"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset(f"weights/{term}" for term in self.terms)

    @property
    def endpoint(self) -> None:
        return None

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        pace = np.repeat(self._row_weights(columns), loss_counts(columns)).astype(np.float32)
        return {**columns, **{name: columns[name].astype(np.float32) * pace if name in columns else pace.copy() for name in self.adds}}

    def _row_weights(self, columns: Columns) -> NDArray[np.float64]:
        """`(R,)`."""
        rewards = columns["reward"].astype(np.float64)
        weights, share = np.ones(len(columns["row_id"])), self.a / (self.a + self.b)
        largest = share**self.a * (1 - share) ** self.b
        for group, judged in groups(columns):
            passes = int(np.count_nonzero(rewards[judged] >= PASSING))
            weights[group] = np.minimum(paced_weight(passes, len(judged), self.a, self.b) / largest, 1.0)  # rounding may exceed it
        return np.where(columns["written"].astype(bool), weights, 1.0)
