"""Likelihood of given tokens under the student."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from strategies.core import Progress
from strategies.head import TokenLogits
from strategies.signals import Signal


@dataclass(frozen=True)
class CrossEntropy:
    """Weighted sum over tokens of `-log q(label)`, always at temperature 1 and unscaled."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        return -(weights * outputs.label_logprobs()).sum()
