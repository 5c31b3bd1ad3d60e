"""Dual-space distillation: each network's states, brought into the other's space, read by the other's output head.

Three objectives that share filters by `StatesTerm.filters`. A teacher with another tokenizer is met by attention between the tokens of
both, or where both have tokens of the same bytes. What is computed at one token depends on its row alone.

Shape letters: n of the student's tokens and m of the teacher's count, D_q and D_p are the networks' widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from strategies.aligned import AlignedStates
from strategies.core import Objective, ObjectiveSettings, Progress, Reads, Term
from strategies.head import Head, TokenBatch, TokenLogits, chunked_terms
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import PositiveSchedule, constant
from strategies.signals import Hidden, Signal
from strategies.taps import OUTPUT, Filter, Tap, Tapped, Taps

Alignment = Literal["attention", "exact"]


def attended(query: Tensor, key: Tensor, values: Tensor, by_row: list[tuple[int, int]]) -> Tensor:
    """`softmax(Q K^T / sqrt(E)) V` `(n, W)` of `(n, E)`, `(m, E)` and `(m, W)`, each row's tokens among those of the same row.

    `by_row` counts the tokens of each row on either side. A row without keys gets zeros.
    """
    ours, theirs = ([pair[side] for pair in by_row] for side in (0, 1))
    if not by_row:
        return values.new_zeros((0, values.shape[-1]))
    rows = zip(query.split(ours), key.split(theirs), values.split(theirs), strict=True)
    return torch.cat([torch.softmax(q @ k.T * query.shape[-1] ** -0.5, -1) @ v for q, k, v in rows])


def in_spans(values: Tensor, of: Tensor, wanted: Tensor) -> Tensor:
    """Mean of `values` `(m, W)` over the tokens of each span, `of` `(m,)`, for the spans `wanted` `(n,)`: `(n, W)`."""
    spans = torch.unique(of)
    number = torch.searchsorted(spans, of)
    sums = values.new_zeros((len(spans), values.shape[-1])).index_add(0, number, values)
    sizes = torch.bincount(number, minlength=len(spans))[:, None]
    return (sums / sizes).index_select(0, torch.searchsorted(spans, wanted))


def own_scale(states: Tensor) -> Tensor:
    """Each of `(m, W)` divided by its own standard deviation, so that states and embeddings add up as equals."""
    deviation = (states - states.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
    return states / torch.where(deviation > 0, deviation, 1.0)


@dataclass(frozen=True)
class Meeting:
    """The tokens of both sides that count, and how states of one side are brought to tokens of the other."""

    student: Tapped
    teacher: AlignedStates
    ours: Tensor
    """`(n,)` places among the student's loss tokens."""
    theirs: Tensor
    """`(m,)` places among the teacher's tokens."""
    weights: Tensor
    """`(n,)` float32."""
    their_weights: Tensor
    """`(m,)`: the largest of the student's in the same span."""

    @staticmethod
    def of(student: Tapped, teacher: Tapped, weights: Tensor) -> Meeting:
        """Tokens of a weight other than 0, and the teacher's in the same spans. `ValueError` for a teacher that shows no spans."""
        if not isinstance(teacher, AlignedStates):
            raise ValueError("dual-space distillation reads a teacher's states in aligned spans, and was given a frozen player's")
        ours = ((weights != 0) & (teacher.ours >= 0)).nonzero()[:, 0]
        spans, number = torch.unique(teacher.ours[ours], return_inverse=True)
        theirs = torch.isin(teacher.theirs, spans).nonzero()[:, 0]
        most = weights.new_zeros(len(spans)).scatter_reduce(0, number, weights[ours].abs(), "amax")
        at = torch.searchsorted(spans, teacher.theirs[theirs])
        return Meeting(student, teacher, ours, theirs, weights[ours], most[at])

    @property
    def by_row(self) -> list[tuple[int, int]]:
        """Counted tokens of each row on either side."""
        rows = self.student.token_rows()[self.ours], self.teacher.token_rows()[self.theirs]
        count = int(torch.cat(rows).max()) + 1 if len(self.ours) else 0
        ours, theirs = (torch.bincount(r, minlength=count).tolist() for r in rows)
        return list(zip(ours, theirs, strict=True))

    @property
    def labels(self) -> Tensor:
        """`(n,)` the student's tokens."""
        assert self.student.labels is not None
        return self.student.labels[self.ours]

    @property
    def their_labels(self) -> Tensor:
        """`(m,)` the teacher's."""
        assert self.teacher.labels is not None
        return self.teacher.labels[self.theirs]

    @property
    def own_states(self) -> Tensor:
        """`(n, D_q)`."""
        return self.student.tokens(OUTPUT)[self.ours]

    @property
    def their_states(self) -> Tensor:
        """`(m, D_p)` float32, without a gradient."""
        return self.teacher.tokens(OUTPUT)[self.theirs].detach().float()

    def heads(self) -> tuple[Head, Head]:
        """The student's, through which gradients pass, and the teacher's."""
        if self.student.head is None or self.teacher.head is None:
            raise ValueError("dual-space distillation reads both networks' output heads, and was given none")
        return self.student.head, self.teacher.head

    def keys(self) -> tuple[Tensor, Tensor]:
        """What says where a token stands: embeddings of the token that is read and of the one that follows, each by its own scale,
        `(n, 2 D_q)` and `(m, 2 D_p)`."""
        return _ends(self.student, self.ours), _ends(self.teacher, self.theirs)


def _ends(network: Tapped, at: Tensor) -> Tensor:
    if network.embed is None or network.reads is None or network.labels is None:
        raise ValueError("attention between two networks reads their embeddings, and was given none")
    found = [own_scale(network.embed(ids[at]).float()) for ids in (network.reads, network.labels)]
    if (width := found[0].shape[-1]) != (output := network.outputs[OUTPUT].shape[-1]):
        raise ValueError(f"input embeddings of width {width} and outputs of width {output}: expected one width, or alignment: exact")
    return torch.cat(found, -1)


class DualSpace(ObjectiveSettings):
    """What the three objectives share: the two networks' outputs, and the filters between them.

    Zhang et al., arXiv:2406.17328 (cross-model attention) and arXiv:2504.11426 (exact token alignment). With `attention`, a state at
    token i of the student is `sum_j A_ij v_j` of the teacher's, `A = softmax(Q K^T / sqrt(2 D_p))` over the tokens of the row; Q and K are
    embeddings of the tokens that are read and that follow, the student's filtered. As in the authors' code nothing is causal: A looks
    at the token to be predicted and at later ones, and t2s states carry the teacher's embedding of it. With `exact`, what is compared is
    the token of the same bytes, for terms that count on spans of one token. Unlike there, filters have no bias, and every state and
    embedding, the student's too, is divided by its own standard deviation instead of that of the micro-batch: nothing depends on
    micro-batches, and attention begins to part tokens at once.
    """

    reads: ClassVar[Reads] = "states"
    alignment: Alignment = "attention"
    """How tokens of both are brought together."""

    @property
    def taps(self) -> Taps:
        return Taps((OUTPUT,), (OUTPUT,))

    def filters(self, student: Mapping[Tap, int], teacher: Mapping[Tap, int]) -> dict[str, Filter]:
        """`t2s` and `s2t` between the widths, and `query` between the embeddings of two tokens each."""
        mine, theirs = student[OUTPUT], teacher[OUTPUT]
        query = {"query": Filter(2 * mine, 2 * theirs)} if self.alignment == "attention" else {}
        return {"t2s": Filter(theirs, mine), "s2t": Filter(mine, theirs), **query}

    def into_student(self, meeting: Meeting, filters: Mapping[str, Filter]) -> Tensor:
        """`(n, D_q)`: the teacher's states in the student's space, at the student's tokens; gradients reach filters alone."""
        states = meeting.their_states
        if self.alignment == "exact":
            teacher = meeting.teacher
            return in_spans(filters["t2s"](states).float(), teacher.theirs[meeting.theirs], teacher.ours[meeting.ours])
        query, key = meeting.keys()
        values = filters["t2s"](own_scale(states) + key[:, key.shape[-1] // 2 :])
        return _attended(filters["query"](query), key, values, meeting.by_row)

    def into_teacher(self, meeting: Meeting, filters: Mapping[str, Filter]) -> Tensor:
        """`(m, D_p)`: the student's states in the teacher's space, at the teacher's tokens."""
        values = filters["s2t"](meeting.own_states)
        if self.alignment == "exact":
            teacher = meeting.teacher
            return in_spans(values.float(), teacher.ours[meeting.ours], teacher.theirs[meeting.theirs])
        query, key = meeting.keys()
        turned = [(theirs, ours) for ours, theirs in meeting.by_row]
        return _attended(key, filters["query"](query), values, turned)


def _attended(query: Tensor, key: Tensor, values: Tensor, by_row: list[tuple[int, int]]) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        return attended(query.float(), key.float(), values.float(), by_row)


class StudentSpaceTask(DualSpace):
    """Weighted sum over the student's tokens of `-log softmax(head_q(t2s))[label]`; only `t2s` and `query` learn from it.

    t2s are the teacher's states in the student's space (see `DualSpace`), read by the student's output head as it stands.
    """

    type: Literal["student-space-task"] = "student-space-task"

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        meeting = Meeting.of(student, teacher, weights)
        head = _fixed(meeting.heads()[0])
        states = self.into_student(meeting, filters).to(meeting.own_states.dtype)
        return _summed(CrossEntropy(), states, head, meeting.labels, None, meeting.weights, progress)


class StudentSpace(DualSpace):
    """Weighted sum over the student's tokens of `T^2 KL(sg[softmax(head_q(t2s)/T)] || q_T)` where the first is likeliest to say the token.

    The student learns from the teacher's states in its own space, read by its own output head, where they are right. Filters learn
    from `StudentSpaceTask` alone. Tokens where they are wrong count in the denominator.
    """

    type: Literal["student-space"] = "student-space"
    temperature: PositiveSchedule = 1.0
    """Divides both sides' logits."""

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        meeting = Meeting.of(student, teacher, weights)
        head, own = meeting.heads()[0], meeting.own_states
        signal = Hidden(self.into_student(meeting, filters).detach().to(own.dtype), _fixed(head).cast(own.dtype))
        return _summed(_WhereRight(temperature=self.temperature), own, head, meeting.labels, signal, meeting.weights, progress)


class TeacherSpace(DualSpace):
    """Weighted sum over the teacher's tokens of `T^2 KL(p_T || softmax(head_p(s2t)/T))`; the student, `s2t` and `query` learn from it.

    s2t are the student's states in the teacher's space (see `DualSpace`), read by the teacher's output head. The sum is divided by the
    number of the student's tokens that count, as any term's.
    """

    type: Literal["teacher-space"] = "teacher-space"
    temperature: PositiveSchedule = 1.0
    """Divides both sides' logits."""

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        meeting = Meeting.of(student, teacher, weights)
        head = meeting.heads()[1]
        signal = Hidden(meeting.their_states.to(head.weight.dtype), head)
        states = self.into_teacher(meeting, filters).to(head.weight.dtype)
        kl = ForwardKL(temperature=self.temperature)
        return _summed(kl, states, head, meeting.their_labels, signal, meeting.their_weights, progress)


class _WhereRight(ForwardKL):
    """Forward KL where the signal's likeliest token is the given one."""

    def values(self, outputs: TokenLogits, signal: Signal, temperature: float, progress: Progress) -> Tensor:
        right = signal.first(outputs, 1)[:, 0] == outputs.labels
        return torch.where(right, super().values(outputs, signal, temperature, progress), 0.0)


def _fixed(head: Head) -> Head:
    """The same head, to which no gradient passes."""
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.transform)


def _summed(
    objective: Objective, states: Tensor, head: Head, labels: Tensor, signal: Signal | None, weights: Tensor, progress: Progress
) -> Tensor:
    """The objective's sum over what `head` says of `states`, a few tokens at a time."""
    read = {} if signal is None else {"other": signal}
    term = Term("space", objective, constant(1.0), signal=None if signal is None else "other")
    batch = TokenBatch(labels, read, {"space": weights})
    return chunked_terms(states, head, batch, (term,), {"space": 1.0}, progress, repeatable=True).loss
