"""Likelihood of given tokens under the student."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenLogits
from strategies.objectives.base import weighted_sum
from strategies.schedule import Share, schedule
from strategies.signals import Signal


def cross_entropy(outputs: TokenLogits, smoothing: float = 0.0) -> Tensor:
    """`-(1 - s) log q(label) - s mean_v log q(v)` at temperature 1, `(N,)`. Szegedy et al., arXiv:1512.00567, section 7.

    With s above 0, a token that the student rules out makes the value infinite.
    """
    given = -outputs.label_logprobs()
    if smoothing == 0.0:
        return given
    return (1.0 - smoothing) * given + smoothing * (outputs.normaliser()[:, 0] - outputs.logits.mean(-1))


class CrossEntropy(ObjectiveSettings):
    """Weighted sum over tokens of `-log q(label)`, always at temperature 1 and unscaled, with optional label smoothing."""

    reads: ClassVar[Reads] = "nothing"
    type: Literal["cross-entropy"] = "cross-entropy"
    smoothing: Share = 0.0
    """Share of the target that is uniform over the vocabulary."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        return weighted_sum(cross_entropy(outputs, schedule(self.smoothing)(progress)), weights)
