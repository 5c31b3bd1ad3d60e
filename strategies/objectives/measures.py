"""What evaluation measures on held-out tokens, whatever kind of distribution the teacher gave. Not for training: most have
no useful gradient. `ValueError` for a signal that is no distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from strategies.core import Objective, Progress, Reads
from strategies.head import TokenLogits
from strategies.objectives.base import weighted_sum
from strategies.objectives.divergence import ForwardKL, ReverseKL
from strategies.signals import Signal, given


@dataclass(frozen=True)
class Top1Agreement:
    """Share of tokens on which both prefer the same next token."""

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        theirs = given(signal, self.reads, "the measure top1_agreement").first(outputs, 1)
        return weighted_sum((outputs.logits.argmax(-1) == theirs[:, 0]).float(), weights)


@dataclass(frozen=True)
class TopKAgreement:
    """Mean share of the teacher's first `k` tokens found among the student's first `k`."""

    k: int = 5

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        theirs = given(signal, self.reads, f"the measure top{self.k}_agreement").first(outputs, self.k)
        mine = outputs.logits.topk(theirs.shape[-1], -1).indices
        shared = (theirs[:, :, None] == mine[:, None, :]).any(-1).float().mean(-1)
        return weighted_sum(shared, weights)


@dataclass(frozen=True)
class TeacherMass:
    """Mass that the teacher puts on its kept tokens; 1 when it keeps all."""

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        _, teacher = given(signal, self.reads, "the measure teacher_topk_mass").kept_mass(outputs)
        return weighted_sum(teacher, weights)


@dataclass(frozen=True)
class StudentMass:
    """Mass that the student puts on the teacher's kept tokens; 1 when the teacher keeps all."""

    reads: ClassVar[Reads] = "pair"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        student, _ = given(signal, self.reads, "the measure student_topk_mass").kept_mass(outputs)
        return weighted_sum(student, weights)


@dataclass(frozen=True)
class TeacherCrossEntropy:
    """The teacher's own `-log p(label)`."""

    reads: ClassVar[Reads] = "label"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        return weighted_sum(-given(signal, self.reads, "the measure teacher_cross_entropy").label_logprobs(outputs), weights)


def measures() -> dict[str, Objective]:
    """Measures against one teacher, by metric name; the KLs at temperature 1, on whatever outcomes the signal pairs."""
    return {
        "forward_kl": ForwardKL(),
        "reverse_kl": ReverseKL(),
        "top1_agreement": Top1Agreement(),
        "top5_agreement": TopKAgreement(5),
        "teacher_topk_mass": TeacherMass(),
        "student_topk_mass": StudentMass(),
    }
