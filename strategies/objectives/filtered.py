"""Task-aware filters: maps that keep of a layer's states what predicts the tokens, and the distance between what they keep.

Two objectives with the same `layers` and `filter`, whose terms share filters by `StatesTerm.filters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads, Term
from strategies.head import TokenBatch, chunked_terms
from strategies.objectives.features import Layers, hidden_mse, hidden_taps
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from strategies.taps import OUTPUT, Filter, Tap, Tapped, Taps

TASK = (Term("task", CrossEntropy(), constant(1.0)),)


FilterKind = Literal["linear", "gelu-linear"]
"""`W h`, or `W gelu(h)`."""


def filtered_taps(layers: Layers) -> Taps:
    """The layers' hidden states, and the states that the teacher's head reads, whose width all filters map to."""
    found = hidden_taps(layers)
    return Taps(found.student, (*found.teacher, OUTPUT))


def paired_filters(layers: Layers, kind: FilterKind, student: Mapping[Tap, int], teacher: Mapping[Tap, int]) -> dict[str, Filter]:
    """`student<i>` and `teacher<i>` for the i-th of `layers`."""
    taps = hidden_taps(layers)
    widths = {f"student{i}": student[tap] for i, tap in enumerate(taps.student)}
    widths |= {f"teacher{i}": teacher[tap] for i, tap in enumerate(taps.teacher)}
    return {name: Filter(width, teacher[OUTPUT], kind == "gelu-linear") for name, width in widths.items()}


class FilterTask(ObjectiveSettings):
    """Weighted sum over tokens of `-log softmax(head(F h))[label]`, averaged over layers, of the student's states plus the
    teacher's; only filters learn from it.

    The first stage of TED (arXiv:2210.01351, section 3). The frozen teacher's own head reads both sides' filtered states, so
    that they lie in one space whatever the student's width; the paper gives each network its own. Networks get no gradient.
    """

    reads: ClassVar[Reads] = "states"
    type: Literal["filter-task"] = "filter-task"
    layers: Layers
    filter: FilterKind = "linear"

    @property
    def taps(self) -> Taps:
        return filtered_taps(self.layers)

    def filters(self, student: Mapping[Tap, int], teacher: Mapping[Tap, int]) -> dict[str, Filter]:
        return paired_filters(self.layers, self.filter, student, teacher)

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        if teacher.head is None or teacher.labels is None:
            raise ValueError("FilterTask reads a frozen player's head and the labels, and was given none")
        batch, taps, total = TokenBatch(teacher.labels, {}, {"task": weights}), hidden_taps(self.layers), weights.new_zeros(())
        for side, network, wanted in (("student", student, taps.student), ("teacher", teacher, taps.teacher)):
            for i, tap in enumerate(wanted):
                states = filters[f"{side}{i}"](network.tokens(tap).detach())
                total = total + chunked_terms(states, teacher.head, batch, TASK, {"task": 1.0}, progress).loss
        return total / len(self.layers)


class FilteredLayers(ObjectiveSettings):
    """Weighted sum over tokens of `mean_l mean_d (F_q h_q - sg[F_p h_p])^2`.

    Layer-wise distillation of TED (arXiv:2210.01351, section 3). The student and its filters learn; the teacher's filters learn
    from `FilterTask` alone.
    """

    reads: ClassVar[Reads] = "states"
    type: Literal["filtered-layers"] = "filtered-layers"
    layers: Layers
    filter: FilterKind = "linear"

    @property
    def taps(self) -> Taps:
        return filtered_taps(self.layers)

    def filters(self, student: Mapping[Tap, int], teacher: Mapping[Tap, int]) -> dict[str, Filter]:
        return paired_filters(self.layers, self.filter, student, teacher)

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        total = weights.new_zeros(())
        taps = hidden_taps(self.layers)
        for i, (mine, theirs) in enumerate(zip(taps.student, taps.teacher, strict=True)):
            kept = filters[f"teacher{i}"](teacher.tokens(theirs).detach()).detach()
            total = total + (weights * hidden_mse(filters[f"student{i}"](student.tokens(mine)).float(), kept.float())).sum()
        return total / len(self.layers)
