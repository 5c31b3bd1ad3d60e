"""Sources: where a term's signal comes from, and what is taken of a teacher.

A take is what is asked about every loss token. A stage of the stream answers it, or a frozen player inside the training
worker; both arrive as the same columns and make the same signal. `Blended` makes one signal of several, and `TakenActions`
one of columns that came with the student's own text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from strategies.acted import Acted
from strategies.aligned import STATES, AlignedStates, Ends, TakeBoundedSpans, TakeForeignTopK, TakeSpans
from strategies.blend import Blend
from strategies.core import Reads, ScoreRequest, Settings
from strategies.head import Head
from strategies.signals import Dense, Hidden, PerToken, Sampled, Signal, Tail, TopK

DISTRIBUTION: frozenset[Reads] = frozenset({"pair", "expectation", "label"})


class TakeTopK(Settings):
    """The teacher's most likely tokens and what becomes of the rest: the usual choice, about 8 bytes a token kept."""

    columns: ClassVar[tuple[str, ...]] = ("ids", "logprobs")
    gives: ClassVar[frozenset[Reads]] = DISTRIBUTION - {"label"}
    type: Literal["topk"] = "topk"
    top_k: PositiveInt = 64
    """Teacher tokens kept per position."""
    tail: Tail = "bucket"
    """`bucket` keeps all others as one outcome; `renormalise` forgets them; `drop` keeps the rest at their own mass."""

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest("topk", top_k=self.top_k)

    def read(self, columns: Mapping[str, Tensor], head: Head | None) -> Signal:
        return TopK(columns["ids"].long(), columns["logprobs"], self.tail)


class TakeDense(Settings):
    """The teacher's whole distribution, 4 bytes times the vocabulary a token: for small vocabularies and as a reference."""

    columns: ClassVar[tuple[str, ...]] = ("dense",)
    gives: ClassVar[frozenset[Reads]] = DISTRIBUTION
    type: Literal["dense"] = "dense"

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest("dense")

    def read(self, columns: Mapping[str, Tensor], head: Head | None) -> Signal:
        return Dense(columns["dense"])


class TakeSampled(Settings):
    """Tokens drawn from the teacher with replacement, for unbiased forward losses (arXiv:2503.16870)."""

    columns: ClassVar[tuple[str, ...]] = ("ids", "logprobs", "weights")
    gives: ClassVar[frozenset[Reads]] = frozenset({"expectation"})
    type: Literal["sampled"] = "sampled"
    draws: PositiveInt = 64
    """Tokens drawn per position."""
    exponent: PositiveFloat = 1.0
    """They are drawn from the probabilities to this power, and weighed so that averages stay unbiased."""

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest("sampled", draws=self.draws, exponent=self.exponent)

    def read(self, columns: Mapping[str, Tensor], head: Head | None) -> Signal:
        return Sampled(columns["ids"].long(), columns["logprobs"], columns["weights"])


class TakeHidden(Settings):
    """The teacher's last hidden states; the training worker applies the teacher's output head. Exact for every objective."""

    columns: ClassVar[tuple[str, ...]] = ("hidden",)
    gives: ClassVar[frozenset[Reads]] = DISTRIBUTION
    type: Literal["hidden"] = "hidden"

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest("hidden")

    def read(self, columns: Mapping[str, Tensor], head: Head | None) -> Signal:
        if head is None:
            raise ValueError("hidden states teach through the teacher's output head, and there is none")
        states = columns["hidden"]
        states = states.view(torch.bfloat16) if states.dtype == torch.int16 else states
        return Hidden(states, head.cast(states.dtype))


class TakePerToken(Settings):
    """The teacher's log-probability of each given token and nothing else, 4 bytes: for estimators on sampled tokens."""

    columns: ClassVar[tuple[str, ...]] = ("logprob",)
    gives: ClassVar[frozenset[Reads]] = frozenset({"label"})
    type: Literal["per-token"] = "per-token"

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest("per-token")

    def read(self, columns: Mapping[str, Tensor], head: Head | None) -> Signal:
        return PerToken(columns["logprob"].flatten())


Take = TakeTopK | TakeDense | TakeSampled | TakeHidden | TakePerToken
TakeConfig = Annotated[Take, Field(discriminator="type")]


def temperable(take: TakeConfig) -> TakeConfig:
    """`ValueError` for what cannot be made warmer token by token, as AdaKD does."""
    if isinstance(take, TakeTopK) and take.tail == "drop":
        raise ValueError("expected tail: bucket or renormalise, because tokens are tempered one by one, and got 'drop'")
    return take


@dataclass(frozen=True)
class Taught:
    """What one teacher gives: an endpoint, by a Score stage under the signal's own name, or a frozen player; or, without either, what a
    stage made of the answers of others, under the signal's name as well."""

    take: Take | TakeSpans | TakeBoundedSpans | TakeForeignTopK
    endpoint: str | None = None
    player: str | None = None

    @property
    def gives(self) -> frozenset[Reads]:
        return self.take.gives

    @property
    def head_of(self) -> str | None:
        """The endpoint whose output head training workers must load."""
        return self.endpoint if isinstance(self.take, TakeHidden) else None

    def columns(self, name: str) -> tuple[str, ...]:
        """Columns of a bundle that the signal `name` is made of."""
        return () if self.player else tuple(f"{name}/{c}" for c in self.take.columns)


@dataclass(frozen=True)
class Blended:
    """One signal made of others of the same strategy, by name and weight (`strategies.blend.Blend`).

    A weight is a number, or the column `(N,)` of a stage, which tells it for every token. Where columns are all 0, members count alike.
    """

    members: Mapping[str, float | str]
    kind: Literal["mixture", "product"] = "mixture"
    gives: frozenset[Reads] = DISTRIBUTION

    def columns(self, name: str) -> tuple[str, ...]:
        """Columns of a bundle that the weights are read from."""
        return tuple(w for w in self.members.values() if isinstance(w, str))

    def of(self, signals: Mapping[str, Signal], columns: Mapping[str, Tensor]) -> Signal:
        """The signal, from its members and the columns `(N, 1)` of a micro-batch."""
        found = tuple(signals[m] for m in self.members)
        known = tuple(s for s in found if isinstance(s, Dense | Hidden | TopK))
        if len(known) < len(found):
            raise ValueError(f"a blend of {', '.join(self.members)}: expected distributions (dense, hidden, or all topk)")
        weights = [columns[w].flatten() if isinstance(w, str) else w for w in self.members.values()]
        if all(isinstance(w, Tensor) for w in weights):
            nobody = torch.stack([w for w in weights if isinstance(w, Tensor)]).sum(0) == 0
            weights = [torch.where(nobody, torch.ones_like(w), w) for w in weights if isinstance(w, Tensor)]
        return Blend(known, tuple(weights), self.kind)


@dataclass(frozen=True)
class TakenActions:
    """What is known of the tokens that a policy wrote: the bundle's own columns, and answers that other signals asked for.

    Columns hold one number for each loss token: `behaviour`, and with `outcome` the verifier's `advantage`, `token_reward` and
    `group_failed`, as `strategies.acted.Acted` names them. `teacher` and `reference` name signals of a Score stage, whose `logprob`
    is read: it stands beside every answer but `hidden`, and costs least with `per-token`. Adds no column and asks nobody.
    """

    teacher: str | None = None
    """Signal of whoever teaches."""
    reference: str | None = None
    """Signal of whoever the teacher's log-probabilities are compared with."""
    outcome: bool = False
    """Whether a verifier's numbers come along."""

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"acted", "label"} if self.teacher else {"acted"})

    def columns(self, name: str) -> tuple[str, ...]:
        """Columns of a bundle that the signal is made of, whatever its own name."""
        return tuple(self._by_field.values())

    def read(self, columns: Mapping[str, Tensor]) -> Acted:
        """The signal, from the columns `(N, 1)` or `(N,)` of a micro-batch."""
        return Acted(**{field: columns[name].flatten().float() for field, name in self._by_field.items()})

    @property
    def _by_field(self) -> dict[str, str]:
        """Columns by the field of `Acted` that they fill."""
        found = {"behaviour": "behaviour"}
        found |= {role: f"{signal}/logprob" for role, signal in (("teacher", self.teacher), ("reference", self.reference)) if signal}
        return found | (OUTCOME if self.outcome else {})


OUTCOME = {"advantage": "advantage", "reward": "token_reward", "group_failed": "group_failed"}
"""Columns of a verifier by the field of `Acted` that they fill."""


@dataclass(frozen=True)
class ForeignStates:
    """Last hidden states of a teacher with another tokenizer at tokens of its own, which a stage laid on the student's, for terms on
    inner states. Its output head and its input embeddings come with them."""

    endpoint: str
    gives: frozenset[Reads] = frozenset({"states"})

    @property
    def head_of(self) -> str:
        """The endpoint both ends of whose model training workers must load."""
        return self.endpoint

    def columns(self, name: str) -> tuple[str, ...]:
        """Columns of a bundle that the signal `name` is made of."""
        return tuple(f"{name}/{c}" for c in STATES)

    def read(self, name: str, columns: Mapping[str, Tensor], rows: Tensor, ends: Ends) -> AlignedStates:
        """From the columns of a micro-batch whose loss tokens are of `rows` `(N,)`."""
        return AlignedStates.laid({c: columns[f"{name}/{c}"] for c in STATES}, rows, ends)


Source = Taught | Blended | TakenActions | ForeignStates


def scored_columns(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Columns of a bundle that all `sources` together are made of, each once."""
    wanted = (c for name, source in sources.items() for c in source.columns(name))
    return tuple(dict.fromkeys(wanted))


def read_sources(sources: Mapping[str, Source], names: Iterable[str]) -> dict[str, Source]:
    """Those of `sources` that signals of these names are made of, members of blends among them."""
    wanted = set(names)
    wanted |= {m for n in wanted if isinstance(source := sources[n], Blended) for m in source.members}
    return {name: source for name, source in sources.items() if name in wanted}
