"""A panel: several teachers of the same rows, how much each counts for a token, and one answer of many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strategies.core import COUNT, Columns, Endpoint, Schedule
from strategies.domains import DOMAIN
from strategies.schedule import constant
from strategies.stages.ask import is_held_out, is_of, progress_of, read_columns
from strategies.stages.judge import loss_counts

GATE = "gate/"
"""Before a teacher's name: how much it counts, `(N,)` float32."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Member:
    """A teacher of a panel."""

    weight: Schedule = constant(1.0)
    """Its share beside the others, before they are made to add up to 1."""
    domains: tuple[str, ...] = ()
    """It counts for rows of these alone; for all without any."""


@dataclass(frozen=True)
class Gate:
    """How much each member of a panel counts for each of the N loss tokens.

    A member's share is its weight times `exp(sharpness * score)`, over the sum of all; with `best` the whole of the highest score. The
    score of a token is that of the member's own answer: `cross-entropy` log p(token), `entropy` -H(p), `confidence` max p, all of which
    are higher for a teacher that knows; `weight` has none. A member does not count for rows of other domains, and for rows that it did not
    answer. Where nobody counts nothing is learnt.

    This project's combiners of several teachers. The entropy of top-k answers takes the rest as
    one token. Beware: cross-entropy prefers teachers that have memorised the data.

    Adds `gate/<member>` (N,) float32, which add up to 1 or are all 0; `count/taught_tokens/<member>` (1,), their sums over tokens;
    `weights/<term>` (N,) for every one of `terms`, 0 where nobody counts, and for those of `member_terms`, the gate of the member. Weights
    that are there already are multiplied.
    """

    members: Mapping[str, Member]
    """By signal."""
    by: Literal["weight", "cross-entropy", "entropy", "confidence"] = "weight"
    sharpness: float = 1.0
    best: bool = False
    terms: tuple[str, ...] = ()
    member_terms: Mapping[str, str] | None = None
    """Terms by member."""

    endpoint = None

    @property
    def needs(self) -> frozenset[str]:
        own = {column for m in self.members.values() for column in read_columns(m.weight, m.domains)}
        answers = {f"{name}/{column}" for name in self.members for column in ("answered", "logprob")}
        return frozenset({"loss_mask", "lengths", "step", "steps"} | own | answers)

    @property
    def adds(self) -> frozenset[str]:
        gates = {f"{prefix}{name}" for name in self.members for prefix in (GATE, f"{COUNT}taught_tokens/")}
        return frozenset(gates | {f"weights/{term}" for term in (*self.terms, *(self.member_terms or {}).values())})

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        gates = self._gates(columns)
        by_member = dict(zip(self.members, gates.T.astype(np.float32), strict=True))
        found: Columns = {GATE + name: values for name, values in by_member.items()}
        found |= {f"{COUNT}taught_tokens/{name}": _one(values.sum()) for name, values in by_member.items()}
        taught = {term: (gates.sum(-1) > 0).astype(np.float32) for term in self.terms}
        taught |= {term: by_member[name] for name, term in (self.member_terms or {}).items()}
        found |= {f"weights/{term}": w * columns.get(f"weights/{term}", np.float32(1)) for term, w in taught.items()}
        return {**columns, **found}

    def _gates(self, columns: Columns) -> Floats:
        """`(N, members)`."""
        counts, progress, held_out = loss_counts(columns), progress_of(columns), is_held_out(columns)
        shares = []
        for name, member in self.members.items():
            weight = 1.0 if held_out else max(0.0, member.weight(progress))
            rows = columns[f"{name}/answered"].astype(bool) & is_of(columns, member.domains)
            shares.append(np.repeat(rows * weight, counts))
        base = np.stack(shares, -1).astype(np.float64)
        scores = np.stack([SCORES[self.by](answer_of(columns, name)) for name in self.members], -1)
        scores = np.where(base > 0, np.fmax(scores, LEAST_SCORE), 2 * LEAST_SCORE)
        if self.best:
            base = (base > 0) & (np.arange(base.shape[-1]) == scores.argmax(-1)[:, None])
        else:
            base = base * np.exp(self.sharpness * (scores - scores.max(-1, keepdims=True)))
        total = base.sum(-1, keepdims=True)
        return np.asarray(base / np.where(total > 0, total, 1.0), dtype=np.float64)


@dataclass(frozen=True)
class OfDomains:
    """Lets `term` count on rows of some domains only: adds or multiplies `weights/<term>` (N,) float32."""

    term: str
    domains: tuple[str, ...]

    endpoint = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"lengths", "loss_mask", DOMAIN})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({f"weights/{self.term}"})

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        name = f"weights/{self.term}"
        counts = np.repeat(is_of(columns, self.domains), loss_counts(columns)).astype(np.float32)
        return {**columns, name: counts * columns[name].astype(np.float32) if name in columns else counts}


@dataclass(frozen=True)
class Choose:
    """One answer of several: for each loss token that of the member that counts most. Adds `<signal>/<column>` for every column of the
    answers to a request of kind `topk` or `dense`."""

    signal: str
    members: tuple[str, ...]
    columns: tuple[str, ...] = ("ids", "logprobs", "logprob")

    endpoint = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(f"{m}/{c}" for m in self.members for c in self.columns) | {GATE + m for m in self.members}

    @property
    def adds(self) -> frozenset[str]:
        return frozenset(f"{self.signal}/{c}" for c in self.columns)

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        chosen = np.stack([columns[GATE + m] for m in self.members]).argmax(0)
        found = {}
        for name in self.columns:
            answers = [columns[f"{m}/{name}"].reshape(len(chosen), -1) for m in self.members]
            width = max(a.shape[-1] for a in answers)  # a teacher that was asked nothing has one number for a whole distribution
            whole = np.empty((len(chosen), width), answers[0].dtype)
            for number, values in enumerate(answers):
                mine = chosen == number
                whole[mine] = values[mine]
            found[f"{self.signal}/{name}"] = whole.ravel()
        return {**columns, **found}


LEAST_SCORE = -1e6
"""In the place of one that is not finite."""


@dataclass(frozen=True)
class Answer:
    """What one member said of N tokens."""

    logprob: Floats
    """`(N,)` of the token itself."""
    logprobs: Floats
    """`(N, K)` of all ids, or of the first."""

    @property
    def whole(self) -> Floats:
        """`(N, K + 1)` with what the K leave out."""
        rest = np.maximum(1.0 - np.exp(self.logprobs).sum(-1, keepdims=True), 0.0)
        return np.concatenate([self.logprobs, np.log(np.maximum(rest, 1e-30))], -1)


def answer_of(columns: Columns, member: str) -> Answer:
    logprob = columns[f"{member}/logprob"].astype(np.float64)
    known = columns.get(f"{member}/logprobs", columns.get(f"{member}/dense", logprob))
    return Answer(logprob, known.reshape(len(logprob), -1).astype(np.float64))


def _negative_entropy(answer: Answer) -> Floats:
    log_p = answer.whole
    return np.asarray((np.exp(log_p) * np.where(np.isneginf(log_p), 0.0, log_p)).sum(-1))


SCORES: Mapping[str, Callable[[Answer], Floats]] = {
    "weight": lambda answer: np.zeros(len(answer.logprob)),
    "cross-entropy": lambda answer: answer.logprob,
    "entropy": _negative_entropy,
    "confidence": lambda answer: np.exp(answer.logprobs.max(-1)),
}
"""How sure a member is of each token, `(N,)`: higher is better."""


def _one(value: float) -> NDArray[np.float32]:
    return np.asarray([value], dtype=np.float32)
