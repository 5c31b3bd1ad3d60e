"""Pacing: prompts that the student sometimes solves count most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strategies.core import Columns, Endpoint
from strategies.stages.judge import PASSING, groups, loss_counts

Control = Literal["none", "random", "uniform"]
"""What pass rates are compared with: `random` deals a bundle's weights among its prompts by lot, `uniform` gives each their mean."""


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
    nobody wrote keep their weights. A `control` leaves the sum of the groups' weights as it is; lots depend on the row ids alone.
    """

    terms: tuple[str, ...]
    a: float = 1.0
    """How much failing prompts are held back; above 0."""
    b: float = 1.0
    """How much solved prompts are held back; above 0."""
    control: Control = "none"

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
        found = list(groups(columns))
        passes = np.asarray([np.count_nonzero(rewards[judged] >= PASSING) for _, judged in found])
        share = self.a / (self.a + self.b)
        largest = share**self.a * (1 - share) ** self.b
        samples = np.asarray([len(judged) for _, judged in found])
        weights = np.minimum(paced_weight(passes, samples, self.a, self.b) / largest, 1.0)  # rounding may exceed it
        spread = np.repeat(self._controlled(weights, columns["row_id"]), [len(group) for group, _ in found])
        return np.where(columns["written"].astype(bool), spread, 1.0)

    def _controlled(self, weights: NDArray[np.float64], row_id: NDArray[np.generic]) -> NDArray[np.float64]:
        """`(G,)` weights of the groups under the control."""
        match self.control:
            case "none":
                return weights
            case "uniform":
                return np.full_like(weights, weights.mean())
            case "random":
                return np.random.default_rng(row_id.astype(np.uint64)).permutation(weights)
