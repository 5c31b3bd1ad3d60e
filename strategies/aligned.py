"""What a teacher with another tokenizer gives: numbers of spans that cover the same bytes on both sides, laid on the student's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor

from strategies.core import Reads, ScoreRequest, Settings
from strategies.head import Head
from strategies.signals import Scarce, Signal


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
class ForeignTopK(SpanLikelihoods):
    """The same, and at the first token of every span the teacher's K likeliest next tokens, of its own vocabulary."""

    ids: Tensor
    """`(N, K)` int64 the student's ids of the very same bytes, -1 where it has none."""
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
