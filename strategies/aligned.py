"""What a teacher with another tokenizer gives: numbers of spans that cover the same bytes on both sides, laid on the student's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from strategies.core import Reads, ScoreRequest, Settings
from strategies.head import Head
from strategies.signals import Scarce, Signal
from strategies.taps import OUTPUT, Tapped

UNITS = "units"
"""The student's ids `(B,)` of tokens that begin a unit of text, which whoever runs the strategy knows."""
UNTOLD = 1.0
"""In the place of a log-probability that is not there."""


@dataclass(frozen=True)
class SpanLikelihoods(Scarce):
    """The teacher's log-probabilities of aligned spans. Tokens of one span stand one after the other."""

    span: Tensor
    """`(N,)` int64 number of each token's span, -1 for a token that is in none; unlike those of other rows."""
    logprobs: Tensor
    """`(N,)` float32: that of the whole span at its first token, 0 elsewhere."""

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"spans"})

    def chunk(self, start: int, stop: int) -> Signal:
        return SpanLikelihoods(self.span[start:stop], self.logprobs[start:stop])


@dataclass(frozen=True)
class BoundedSpans(SpanLikelihoods):
    """The same, and how likely the teacher is to begin a new unit of text after each span."""

    begins: Tensor
    """`(N,)` float32: at the token after a span, the log-probability of all of the teacher's tokens together that begin a unit;
    `UNTOLD` where the token before ends no span."""
    own: Tensor
    """`(B,)` int64 the student's tokens that begin one."""

    def chunk(self, start: int, stop: int) -> Signal:
        return BoundedSpans(self.span[start:stop], self.logprobs[start:stop], self.begins[start:stop], self.own)


@dataclass(frozen=True)
class ForeignTopK(SpanLikelihoods):
    """The same, and at the first token of every span the teacher's K likeliest next tokens, of its own vocabulary."""

    ids: Tensor
    """`(N, K)` int64 the student's ids of the very same bytes or special role, -1 where it has none."""
    kept: Tensor
    """`(N, K)` float32 log-probabilities at temperature 1, falling."""

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"spans", "foreign"})

    def chunk(self, start: int, stop: int) -> Signal:
        part = slice(start, stop)
        return ForeignTopK(self.span[part], self.logprobs[part], self.ids[part], self.kept[part])


class TakeSpans(Settings):
    """The log-probability of every aligned span, 8 bytes a token."""

    columns: ClassVar[tuple[str, ...]] = ("span", "logprob")
    gives: ClassVar[frozenset[Reads]] = frozenset({"spans"})
    type: Literal["spans"] = "spans"

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest("per-token")

    def read(self, columns: Mapping[str, Tensor], head: Head | None) -> Signal:
        return SpanLikelihoods(columns["span"].flatten().long(), columns["logprob"].flatten())


class TakeBoundedSpans(Settings):
    """The same, and of every place behind a span how likely a new unit of text begins there, 12 bytes a token."""

    columns: ClassVar[tuple[str, ...]] = ("span", "logprob", "begins")
    gives: ClassVar[frozenset[Reads]] = frozenset({"spans"})
    type: Literal["bounded-spans"] = "bounded-spans"

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest("among")

    def read(self, columns: Mapping[str, Tensor], head: Head | None) -> Signal:
        """`columns` have the student's ids that begin a unit, too, as `UNITS`."""
        return BoundedSpans(
            columns["span"].flatten().long(), columns["logprob"].flatten(), columns["begins"].flatten(), columns[UNITS].long()
        )


class TakeForeignTopK(Settings):
    """The same, and the teacher's most likely tokens where a span begins, 8 bytes a token kept."""

    columns: ClassVar[tuple[str, ...]] = ("span", "logprob", "ids", "logprobs")
    gives: ClassVar[frozenset[Reads]] = frozenset({"spans", "foreign"})
    type: Literal["foreign-topk"] = "foreign-topk"
    top_k: PositiveInt = 64
    """Teacher tokens kept per position."""

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest("topk", top_k=self.top_k)

    def read(self, columns: Mapping[str, Tensor], head: Head | None) -> Signal:
        span, logprob = columns["span"].flatten().long(), columns["logprob"].flatten()
        return ForeignTopK(span, logprob, columns["ids"].long(), columns["logprobs"])


STATES = ("span", "hidden", "theirs", "reads", "labels")
"""Columns of a teacher's own tokens, laid on the student's (`strategies.stages.laid`)."""


@dataclass(frozen=True)
class Ends:
    """Both ends of a frozen network."""

    head: Head
    embedding: Tensor
    """`(V, D)` of its input tokens."""


@dataclass(frozen=True, kw_only=True)
class AlignedStates(Tapped):
    """What a teacher with another tokenizer computed at M tokens of its own, beside the N tokens of the student in the same spans."""

    ours: Tensor
    """`(N,)` int64 the span of each loss token of the student, -1 for none."""
    theirs: Tensor
    """`(M,)` int64 that of each of the teacher's."""

    @staticmethod
    def laid(columns: Mapping[str, Tensor], rows: Tensor, ends: Ends) -> AlignedStates:
        """From `STATES` of a micro-batch, `(N, ...)` with K places for a token, whose tokens are of `rows` `(N,)`."""
        there = columns["theirs"] >= 0
        hidden = columns["hidden"].view(torch.bfloat16) if columns["hidden"].dtype == torch.int16 else columns["hidden"]
        width = ends.head.weight.shape[-1]
        states = hidden.reshape(*there.shape, width)[there] if hidden.numel() else hidden.new_zeros((0, width))
        return AlignedStates(
            outputs={OUTPUT: states[None]},
            index=torch.arange(len(states), device=states.device),
            rows=rows[:, None].expand_as(there)[there][None],
            labels=columns["labels"][there].long(),
            head=ends.head,
            reads=columns["reads"][there].long(),
            embed=lambda ids: ends.embedding[ids],
            ours=columns["span"].flatten().long(),
            theirs=columns["theirs"][there].long(),
        )
