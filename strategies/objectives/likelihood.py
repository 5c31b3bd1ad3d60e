"""Likelihood of given tokens under the student."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenLogits
from strategies.signals import Signal


class CrossEntropy(ObjectiveSettings):
    """Weighted sum over tokens of `-log q(label)`, always at temperature 1 and unscaled."""

    reads: ClassVar[Reads] = "nothing"
    type: Literal["cross-entropy"] = "cross-entropy"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        return -(weights * outputs.label_logprobs()).sum()
