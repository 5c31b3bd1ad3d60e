"""Align: where a teacher with another tokenizer reads the same bytes, and its answers laid on the student's tokens.

Two tokenisations of one text share the places where a token ends in both. Between two such places lies a *span*: some tokens of the
student and some of the teacher that cover identical bytes, and no shorter piece of them does. Text itself never gets here: whoever runs
the strategy makes ids of it (`Reader`), and tells by numbers where tokens end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from strategies.aligned import STATES
from strategies.core import COUNT, Columns, Endpoint, ScoreRequest, Stage
from strategies.stages.laid import followed, laid_begins, laid_states
from strategies.stages.score import Score

Ints = NDArray[np.int64]
NONE = -1
"""The span of a token that is in none, and the place of a teacher's token that stands for nothing of the row."""
Which = Literal["all", "first", "one", "several"]
"""Tokens of aligned spans: all, the first of each, those of spans of one token on either side, those of the others."""
AMONG = "among"
VIEW = ("tokens", "lengths", "loss_mask", "theirs")
"""Columns of a signal that only the teacher's answer needs."""


@dataclass(frozen=True)
class Reading:
    """The rows of a bundle as a teacher reads them.

    Places count the bytes of all rows, one row after the other; a token of the student that is no text has one place of its own.
    """

    tokens: NDArray[np.int32]
    """`(S',)` ids of the teacher."""
    lengths: NDArray[np.int32]
    """`(R,)` of its rows."""
    ours: Ints
    """`(S,)` places where the student's tokens end, rising."""
    theirs: Ints
    """`(S',)` places where the teacher's tokens end, never falling: of several that share a character all end with it. `NONE` for those
    that stand for nothing of the row, such as its BOS."""
    cuts: Ints
    """Places, rising, that no span reaches across, whether or not tokens end there: ends of rows and of text, and where what the teacher
    does not read begins and ends. No token of the teacher lies across one."""


class Reader(Protocol):
    """Reads rows with a teacher's tokenizer."""

    def read(self, columns: Columns) -> Reading:
        """The same bytes in the teacher's tokens. What cannot be read, such as half of a character, it leaves out."""
        ...


@dataclass(frozen=True)
class Spans:
    """Numbers of the aligned spans that tokens are in, counted from 0; `NONE` for tokens that are in none."""

    ours: Ints
    """`(S,)`."""
    theirs: Ints
    """`(S',)`."""
    count: int


def spans(ours: Ints, theirs: Ints, cuts: Ints) -> Spans:
    """The shortest aligned spans, from the places where tokens end (see `Reading`)."""
    read = theirs[theirs != NONE]
    bounds = np.union1d(ours[_among(ours, read)], cuts[cuts > 0])
    ends = _among(bounds, ours)
    both = ends & _among(bounds, read) & np.concatenate([np.ones(min(1, len(ends)), np.bool_), ends[:-1]])
    numbers = np.where(both, np.cumsum(both) - 1, NONE)
    found = np.full(len(theirs), NONE, dtype=np.int64)
    found[theirs != NONE] = numbers[np.searchsorted(bounds, read)]
    return Spans(numbers[np.searchsorted(bounds, ours)], found, int(np.count_nonzero(both)))


def _among(places: Ints, rising: Ints) -> NDArray[np.bool_]:
    """Whether each of `places` is one of `rising`."""
    if not len(rising):
        return np.zeros(len(places), dtype=np.bool_)
    found: NDArray[np.bool_] = rising[np.minimum(np.searchsorted(rising, places), len(rising) - 1)] == places
    return found


def taught_spans(reading: Reading, loss_mask: NDArray[np.generic]) -> Spans:
    """The spans of which every token is learnt by the student, and predicted by the teacher: nobody predicts a row's first token."""
    found = spans(reading.ours, reading.theirs, reading.cuts)
    ends = np.cumsum(reading.lengths, dtype=np.int64)
    first = found.theirs[(ends - reading.lengths)[reading.lengths > 0]]
    lost = np.concatenate([found.ours[loss_mask == 0], first])
    kept = np.ones(found.count + 1, dtype=np.bool_)  # the last entry is that of `NONE`
    kept[lost] = False
    kept[-1] = False
    numbers = np.where(kept, np.cumsum(kept) - 1, NONE)
    return Spans(numbers[found.ours], numbers[found.theirs], int(np.count_nonzero(kept)))


@dataclass(frozen=True)
class Align:
    """Shows a teacher with another tokenizer the same text, and numbers the spans where both tokenisations cover the same bytes.

    Adds `<signal>/span` (N,) int32, the number of each loss token's span or -1; the teacher's rows as `<signal>/tokens`,
    `<signal>/lengths` and `<signal>/loss_mask`, whose M loss tokens are those in spans; `<signal>/theirs` (M,) int32, their spans; and
    how many loss tokens are in none, `count/unaligned/<signal>` (1,). Spans are numbered alike on both sides, in order.
    """

    signal: str
    reader: Reader | None = None
    """Known to whoever runs the strategy."""
    of: str = ""
    """Name of the endpoint whose tokenizer reads."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tokens", "lengths", "loss_mask"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({*(f"{self.signal}/{c}" for c in (*VIEW, "span")), f"{COUNT}unaligned/{self.signal}"})

    @property
    def endpoint(self) -> str | None:
        return None

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        if self.reader is None:
            raise ValueError(f"stage Align needs the tokenizers of the student and of {self.of!r}, and was given none")
        reading = self.reader.read(columns)
        found = taught_spans(reading, columns["loss_mask"])
        span = found.ours[columns["loss_mask"] != 0].astype(np.int32)
        shown: dict[str, NDArray[Any]] = {
            "tokens": reading.tokens,
            "lengths": reading.lengths,
            "loss_mask": (found.theirs != NONE).astype(np.uint8),
            "theirs": found.theirs[found.theirs != NONE].astype(np.int32),
            "span": span,
        }
        unaligned = np.asarray([np.count_nonzero(span == NONE)], dtype=np.float32)
        return {**columns, **{f"{self.signal}/{n}": v for n, v in shown.items()}, f"{COUNT}unaligned/{self.signal}": unaligned}


@dataclass(frozen=True)
class AlignedTokens:
    """Lets the term called `term` count on aligned loss tokens only: adds or multiplies its `weights/<term>` (N,) float32.

    `which`: `all` tokens of spans; the `first` of each span, before which both networks have read the same bytes; those of spans of
    `one` token on either side; or those of `several` on either side.
    """

    term: str
    signal: str
    which: Which = "all"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"{self.signal}/span", f"{self.signal}/theirs"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({f"weights/{self.term}"})

    @property
    def endpoint(self) -> str | None:
        return None

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        span, name = columns[f"{self.signal}/span"], f"weights/{self.term}"
        weights = self._counts(span, columns[f"{self.signal}/theirs"]).astype(np.float32)
        return {**columns, name: columns[name].astype(np.float32) * weights if name in columns else weights}

    def _counts(self, span: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = span != NONE
        if self.which == "all" or not inside.any():
            return inside
        if self.which == "first":
            first: NDArray[np.bool_] = inside & begins(span)
            return first
        alone: NDArray[np.bool_] = (np.bincount(span[inside]) == 1) & (np.bincount(theirs) == 1)
        chosen: NDArray[np.bool_] = inside & (alone[span] if self.which == "one" else ~alone[span])
        return chosen


def begins(span: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of the tokens with these spans is the first of its own."""
    return np.concatenate([np.ones(min(1, len(span)), np.bool_), span[1:] != span[:-1]])


@dataclass(frozen=True)
class ScoreAligned:
    """Asks a teacher about its own tokens of the aligned spans, and lays its answers on the student's N loss tokens.

    Adds `<signal>/logprob` (N,) float32: at the first token of a span the teacher's log-probability of the whole span, by the chain
    rule, and 0 elsewhere. With a `topk` request also `<signal>/ids` (N*K,) int32 and `<signal>/logprobs` (N*K,) float32, its
    likeliest tokens at the first token of each span, where both have read the same bytes: as ids of the student where the student has a
    token of the very same bytes or special role, and -1 where not. Elsewhere their ids are -1 and their log-probabilities 0. With an
    `among` request also `<signal>/begins` (N,) float32 (`strategies.aligned.BoundedSpans`). With a `hidden` request, instead of all these,
    its states at its own tokens as `strategies.stages.laid` lays them: `<signal>/hidden`, `theirs`, `labels` and `reads`. Besides
    `<signal>/seconds` and `<signal>/dropped_mass` of `Score`. Takes away what only the teacher needed of `Align`.
    """

    signal: str
    endpoint: str
    request: ScoreRequest
    shared: tuple[int, ...] = ()
    """By id of the teacher the student's id of the same bytes or role, or -1; known to whoever runs the strategy."""
    units: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Ids of tokens that begin a unit of text: the student's and the teacher's; known to whoever runs the strategy."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(f"{self.signal}/{c}" for c in (*VIEW, "span"))

    @property
    def adds(self) -> frozenset[str]:
        answers = {"hidden": STATES[1:], "among": ("begins", "logprob")}.get(self.request.kind, self.request.answers)
        return frozenset(f"{self.signal}/{c}" for c in (*answers, "dropped_mass", "seconds"))

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        shown = {name: columns[f"{self.signal}/{name}"] for name in VIEW[:3]}
        scored = self._scored({**columns, **shown}, endpoint)
        span, theirs = columns[f"{self.signal}/span"], columns[f"{self.signal}/theirs"]
        if self.request.kind == "hidden":
            laid = laid_states(columns, shown, scored[f"{self.signal}/hidden"], theirs)
        else:
            laid = self._laid(scored, len(span), np.flatnonzero((span != NONE) & begins(span)), np.flatnonzero(begins(theirs)))
        if self.request.kind == "among":
            laid |= laid_begins(columns, shown, span, theirs, scored[AMONG])
        found = {f"{self.signal}/{n}": v for n, v in laid.items()}
        kept = {n: v for n, v in scored.items() if n not in {AMONG, *(f"{self.signal}/{c}" for c in VIEW)}}
        return {**kept, **{n: columns[n] for n in VIEW[:3]}, **found}

    def _scored(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        """The answers about the M loss tokens; asked `among`, those of all S' tokens that were asked about as `AMONG`, 0 elsewhere."""
        score = Score(self.signal, self.endpoint, self.request)
        if self.request.kind != "among":
            return score(columns, endpoint)
        mask = columns["loss_mask"] != 0
        asked = mask | followed(columns)
        wanted = {"loss_mask": asked.astype(np.uint8), "wanted": np.asarray(self.units[1], np.int32)}
        scored = score({**columns, **wanted}, endpoint)
        everywhere = np.zeros(len(mask), np.float32)
        everywhere[asked] = scored.pop(f"{self.signal}/among")
        del scored["wanted"]
        return {**scored, f"{self.signal}/logprob": scored[f"{self.signal}/logprob"][mask[asked]], AMONG: everywhere}

    def _laid(self, scored: Columns, tokens: int, ours: Ints, theirs: Ints) -> Columns:
        """The answers on the student's tokens; spans begin at `ours` of its loss tokens and at `theirs` of the teacher's."""
        own, logprob = scored[f"{self.signal}/logprob"].astype(np.float64), np.zeros(tokens, np.float32)
        logprob[ours] = np.add.reduceat(own, theirs) if len(theirs) else 0.0
        if self.request.kind != "topk":
            return {"logprob": logprob}
        k = self.request.top_k
        ids, logprobs = np.full((tokens, k), NONE, np.int32), np.zeros((tokens, k), np.float32)
        known = np.asarray(self.shared or (NONE,), dtype=np.int32)
        given: NDArray[Any] = scored[f"{self.signal}/ids"].reshape(-1, k)[theirs]
        ids[ours] = np.where(given < len(known), known[np.minimum(given, len(known) - 1)], NONE)
        logprobs[ours] = scored[f"{self.signal}/logprobs"].reshape(-1, k)[theirs]
        return {"logprob": logprob, "ids": ids.ravel(), "logprobs": logprobs.ravel()}


def alignments(stages: Sequence[Stage]) -> list[Align]:
    """Those of `stages` that align."""
    return [s for s in stages if isinstance(s, Align)]


def foreign(stages: Sequence[Stage]) -> frozenset[str]:
    """Endpoints that are asked about tokens of their own alone, so that they may have a tokenizer of their own."""
    return frozenset(s.endpoint for s in stages if isinstance(s, ScoreAligned)) - {
        s.endpoint for s in stages if s.endpoint and not isinstance(s, ScoreAligned)
    }
