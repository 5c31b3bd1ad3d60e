"""What evaluation measures on held-out tokens. Not for training: most have no useful gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.core import Objective, Progress, Reads
from strategies.head import TokenLogits
from strategies.objectives.divergence import forward_kl, reverse_kl
from strategies.signals import Signal, TopK


@dataclass(frozen=True)
class ForwardKLMeasure:
    """KL(teacher || student) at temperature 1, on whatever outcomes the signal pairs."""

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        return (weights * forward_kl(*_given(signal).pair(outputs, 1.0))).sum()


@dataclass(frozen=True)
class ReverseKLMeasure:
    """KL(student || teacher) at temperature 1, on whatever outcomes the signal pairs."""

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        return (weights * reverse_kl(*_given(signal).pair(outputs, 1.0))).sum()


@dataclass(frozen=True)
class Top1Agreement:
    """Share of tokens on which both prefer the same next token."""

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        return (weights * (outputs.logits.argmax(-1) == _topk(signal).ids[:, 0])).sum()


@dataclass(frozen=True)
class TopKAgreement:
    """Mean share of the teacher's first `k` tokens found among the student's first `k`."""

    k: int = 5

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        theirs = _topk(signal).ids[:, : self.k]
        mine = outputs.logits.topk(theirs.shape[-1], -1).indices
        shared = (theirs[:, :, None] == mine[:, None, :]).any(-1).float().mean(-1)
        return (weights * shared).sum()


@dataclass(frozen=True)
class TeacherMass:
    """Mass that the teacher puts on its kept tokens."""

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        return (weights * _topk(signal).logprobs.exp().sum(-1)).sum()


@dataclass(frozen=True)
class StudentMass:
    """Mass that the student puts on the teacher's kept tokens."""

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        inside, _ = outputs.partition(_topk(signal).ids, 1.0, want_tail=False)
        return (weights * torch.logsumexp(inside, -1).exp()).sum()


def measures() -> dict[str, Objective]:
    """Measures against one teacher, by metric name."""
    return {
        "forward_kl": ForwardKLMeasure(),
        "reverse_kl": ReverseKLMeasure(),
        "top1_agreement": Top1Agreement(),
        "top5_agreement": TopKAgreement(5),
        "teacher_topk_mass": TeacherMass(),
        "student_topk_mass": StudentMass(),
    }


def _given(signal: Signal | None) -> Signal:
    if signal is None:
        raise ValueError("this measure compares with a teacher, and its term names no signal")
    return signal


def _topk(signal: Signal | None) -> TopK:
    if not isinstance(signal, TopK):
        raise ValueError(f"this measure reads a teacher's top-k, and got {type(signal).__name__}")
    return signal
