"""A panel: several teachers of the same rows. Who is asked about which, how much each counts for a token, and one answer of many."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strategies.control import CONTROL, Controlled, told
from strategies.core import COUNT, Columns, Endpoint, Progress, Schedule
from strategies.domains import DOMAIN, domain_id
from strategies.schedule import constant
from strategies.stages.judge import loss_counts
from strategies.stages.score import Score

GATE = "gate/"
"""Before a teacher's name: how much it counts, `(N,)` float32."""
PATIENCE_SECONDS = (1.0, 60.0)
"""First and longest pause before somebody who did not answer is asked again."""
CONTROL_NAMES = ("step", "steps", "bundle", "attempt", "rows_total", "policy_version")
"""Columns of one number that say what a bundle is for."""
OnFailure = Literal["stop", "wait", "reweight"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ask(Score):
    """Score by one of several teachers: only of rows that it is meant for, and only at steps at which it has a weight.

    Adds what `Score` adds, where a teacher that was not asked about a row is taken to know nothing, `<signal>/answered` (R,) uint8, and
    `count/unanswered/<signal>` (1,), rows that it should have answered and did not. Held-out rows (`step` 0) are asked of everybody.
    For requests of kind `topk` and `dense`.
    """

    domains: tuple[str, ...] = ()
    """Rows of these alone; of all without any."""
    weight: Schedule = constant(1.0)
    """Nothing is asked at steps at which it is 0."""
    on_failure: OnFailure = "stop"
    """When nobody answers (`ConnectionError`): the error is raised; or the same is asked again until somebody does; or the rows go on
    without this teacher, but for held-out ones, which wait."""

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"row_id", "step", "steps"} | read_columns(self.weight, self.domains)

    @property
    def adds(self) -> frozenset[str]:
        return super().adds | {f"{self.signal}/answered", f"{COUNT}unanswered/{self.signal}"}

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        if endpoint is None:
            raise ValueError(f"stage Ask needs the endpoint {self.endpoint!r} and was given none")
        held_out = is_held_out(columns)
        asked = np.ones(len(columns["lengths"]), dtype=bool) if held_out else self._asked(columns)
        began = time.perf_counter()
        answers = self._answers(rows_of(columns, asked), endpoint, held_out) if asked.any() else None
        answered = asked if answers is not None else np.zeros_like(asked)
        found = self._whole(answers or {}, np.repeat(answered, loss_counts(columns)))
        found |= {"seconds": _one(time.perf_counter() - began), "answered": answered.astype(np.uint8)}
        lacking = _one(int(np.count_nonzero(asked & ~answered)))
        return {**columns, **{f"{self.signal}/{n}": v for n, v in found.items()}, f"{COUNT}unanswered/{self.signal}": lacking}

    def _asked(self, columns: Columns) -> NDArray[np.bool_]:
        """Rows `(R,)` that it is to answer for."""
        return is_of(columns, self.domains) & (self.weight(progress_of(columns)) != 0)

    def _answers(self, columns: Columns, endpoint: Endpoint, held_out: bool) -> Columns | None:
        """None where the rows go on without an answer."""
        pause, longest = PATIENCE_SECONDS
        while True:
            try:
                return endpoint.score(columns, self.request)
            except ConnectionError:
                if self.on_failure == "stop":
                    raise
                if self.on_failure == "reweight" and not held_out:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, longest)

    def _whole(self, answers: Columns, places: NDArray[np.bool_]) -> Columns:
        """Answers about some loss tokens, those at `places` (N,), as answers about all."""
        tokens = len(places)
        width = self.request.top_k or (len(answers["dense"]) // max(1, int(places.sum())) if answers else 1)
        even = -np.log(width + (self.request.kind == "topk"))  # the rest counts as one more token
        blank: Columns = {"logprob": np.full(tokens, even, np.float32)}
        if self.request.kind == "topk":
            ids = np.broadcast_to(np.arange(width, dtype=np.int32), (tokens, width)).copy()
            blank |= {"ids": ids, "logprobs": np.full((tokens, width), even, np.float32)}
        else:
            blank["dense"] = np.full((tokens, width), even, np.float32)
        for name, values in blank.items():
            if answers:
                values[places] = answers[name].reshape(-1, *values.shape[1:])
        more = {name: answers[name] for name in ("cost",) if name in answers}
        return {n: v.ravel() for n, v in blank.items()} | more | {"dropped_mass": answers.get("dropped_mass", _one(0.0))}


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

    The book's combiners of several teachers (`lowest_ce` is cross-entropy with `best`). The entropy of top-k answers takes the rest as
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
        scores = np.where(base > 0, np.maximum(scores, LEAST_SCORE), 2 * LEAST_SCORE)
        if self.best:
            base = (base > 0) & (np.arange(base.shape[-1]) == scores.argmax(-1)[:, None])
        else:
            base = base * np.exp(self.sharpness * (scores - scores.max(-1, keepdims=True)))
        total = base.sum(-1, keepdims=True)
        return np.asarray(base / np.where(total > 0, total, 1.0), dtype=np.float64)


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
    return np.asarray((np.exp(log_p) * log_p).sum(-1))


SCORES: Mapping[str, Callable[[Answer], Floats]] = {
    "weight": lambda answer: np.zeros(len(answer.logprob)),
    "cross-entropy": lambda answer: answer.logprob,
    "entropy": _negative_entropy,
    "confidence": lambda answer: np.exp(answer.logprobs.max(-1)),
}
"""How sure a member is of each token, `(N,)`: higher is better."""


def is_held_out(columns: Columns) -> bool:
    return int(columns["step"][0]) == 0


def progress_of(columns: Columns) -> Progress:
    """Where the run stands that a bundle is made for; its beginning for held-out rows."""
    return Progress(max(0, int(columns["step"][0]) - 1), int(columns["steps"][0]), told(columns))


def read_columns(weight: Schedule, domains: tuple[str, ...]) -> frozenset[str]:
    """Columns that a member's weight and domains are read from."""
    moved = {CONTROL + weight.control} if isinstance(weight, Controlled) else set()
    return frozenset(moved | ({DOMAIN} if domains else set()))


def is_of(columns: Columns, domains: tuple[str, ...]) -> NDArray[np.bool_]:
    """Rows `(R,)` of some domains; all where there are none."""
    if not domains:
        return np.ones(len(columns["lengths"]), dtype=bool)
    return np.isin(columns[DOMAIN], [domain_id(name) for name in domains])


def rows_of(columns: Columns, wanted: NDArray[np.bool_]) -> Columns:
    """The rows of a bundle that are `wanted` (R,), as an endpoint reads them, with its columns of one number."""
    by_token = np.repeat(wanted, columns["lengths"].astype(np.int64))
    flat = {name: columns[name][by_token] for name in ("tokens", "loss_mask")}
    control: Columns = {name: columns[name] for name in CONTROL_NAMES if name in columns}
    return {**flat, **{name: columns[name][wanted] for name in ("lengths", "row_id")}, **control}


def _one(value: float) -> NDArray[np.float32]:
    return np.asarray([value], dtype=np.float32)
