"""Signals: what teaches, typed. Distributions meet the student through `pair`, and draws through `expect`, so that no
objective asks which signal it got. Teacher tensors never carry a gradient. `blend.py` makes one signal of several; `acted.py`
holds what is known of the student's own text.

Where vocabularies differ in size (padding of one tokenizer), ids that the teacher lacks have probability 0 on its side, and
mass on ids that the student lacks goes to the others in proportion; it is not measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

import torch
from torch import Tensor

from strategies.core import Reads

if TYPE_CHECKING:
    from strategies.head import Head, TokenLogits

Tail = Literal["bucket", "renormalise", "drop"]
TAIL_FLOOR = 1e-9
"""Smallest teacher mass given to the bucket, so that the reverse direction stays finite."""

WOULD_WORK: dict[Reads, str] = {
    "pair": "whole distributions (Dense, Hidden, TopK, Blend)",
    "expectation": "an average under the teacher (Dense, Hidden, TopK, Blend, Sampled)",
    "label": "the teacher's log-probability of the given token (PerToken, Dense, Hidden, Blend of those, Acted with a teacher)",
    "acted": "what is known of tokens that a policy wrote (Acted)",
    "spans": "likelihoods of aligned spans of a teacher with another tokenizer (SpanLikelihoods, ForeignTopK)",
    "foreign": "the next tokens of a teacher with another tokenizer (ForeignTopK)",
}


class Signal(Protocol):
    """A teacher's view of N tokens. What a kind does not list in `gives`, it refuses with a `ValueError`."""

    @property
    def gives(self) -> frozenset[Reads]:
        """What objectives may read from this signal."""

    @property
    def whole(self) -> bool:
        """Whether both sides of `pair` add up to one; only draws and a dropped tail do not."""

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        """Aligned (log q, log p), each `(N, M)` float32, both tempered by `temperature`."""

    def expect(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(w, log q, log p), each `(N, M)` float32: `sum(w * f)` over M is an average of f under the tempered teacher,
        in expectation over draws where there are any. w is 0 where log p is -inf."""

    def label_logprobs(self, outputs: TokenLogits) -> Tensor:
        """The teacher's `log p(label)` at temperature 1, `(N,)` float32."""

    def first(self, outputs: TokenLogits, k: int) -> Tensor:
        """Ids below V of the teacher's first k choices, falling, `(N, min(k, K))` int64, where K are known."""

    def kept_mass(self, outputs: TokenLogits) -> tuple[Tensor, Tensor]:
        """Mass at temperature 1 that (student, teacher) put on the K tokens whose probability is known, each `(N,)`."""

    def chunk(self, start: int, stop: int) -> Signal:
        """The same signal for tokens `start:stop`."""


def given(signal: Signal | None, reads: Reads, objective: str) -> Signal:
    """`signal`, when it gives what the objective so called reads; else a `ValueError` that says what would work."""
    if signal is None:
        raise ValueError(f"{objective} compares with a teacher, and its term names no signal; expected {WOULD_WORK[reads]}")
    if reads not in signal.gives:
        raise ValueError(f"{objective} cannot read the signal {type(signal).__name__}; expected {WOULD_WORK[reads]}")
    return signal


class Distribution:
    """What distributions share: `student` and `teacher` are the two sides of a pair, over the whole vocabulary here."""

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"pair", "expectation", "label"})

    @property
    def whole(self) -> bool:
        return True

    def teacher(self, vocabulary: int, temperature: float) -> Tensor:
        """log p, `(N, M)` float32, for a student of so many tokens."""
        raise NotImplementedError

    def student(self, outputs: TokenLogits, temperature: float) -> Tensor:
        """log q on the same outcomes."""
        return outputs.logprobs(temperature)

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        return self.student(outputs, temperature), self.teacher(outputs.logits.shape[-1], temperature)

    def expect(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        log_q, log_p = self.pair(outputs, temperature)
        return log_p.exp(), log_q, log_p

    def label_logprobs(self, outputs: TokenLogits) -> Tensor:
        return self.teacher(outputs.logits.shape[-1], 1.0).gather(-1, outputs.labels[:, None])[:, 0]

    def first(self, outputs: TokenLogits, k: int) -> Tensor:
        log_p = self.teacher(outputs.logits.shape[-1], 1.0)
        return log_p.topk(min(k, log_p.shape[-1]), -1).indices

    def kept_mass(self, outputs: TokenLogits) -> tuple[Tensor, Tensor]:
        ones = torch.ones(len(outputs.labels), device=outputs.labels.device)
        return ones, ones


@dataclass(frozen=True)
class Dense(Distribution):
    """The teacher's logits over its whole vocabulary, such as those of a frozen network in the training job."""

    logits: Tensor
    """`(N, V')` any float dtype; log-probabilities at temperature 1 do as well."""

    def chunk(self, start: int, stop: int) -> Dense:
        return Dense(self.logits[start:stop])

    def teacher(self, vocabulary: int, temperature: float) -> Tensor:
        return _log_softmax(self.logits.detach(), vocabulary, temperature)


@dataclass(frozen=True)
class Hidden(Distribution):
    """The teacher's last hidden states and its output head: `(N, V')` logits exist only for the block in hand, for all terms together.

    The product runs in the dtype of `hidden` (bfloat16 accumulates in float32), everything after it in float32.
    """

    hidden: Tensor
    """`(N, D_t)`."""
    head: Head
    """The teacher's; cast it to the dtype of `hidden` beforehand, or every chunk casts it."""
    made: Tensor | None = None
    """`(N, V')` raw logits in the same dtype, once `ready` has made them."""

    def chunk(self, start: int, stop: int) -> Hidden:
        return Hidden(self.hidden[start:stop], self.head, None if self.made is None else self.made[start:stop])

    def ready(self) -> Hidden:
        """See `strategies.cut.Costly`."""
        return Hidden(self.hidden, self.head, self.head.block(self.hidden))

    def teacher(self, vocabulary: int, temperature: float) -> Tensor:
        with torch.no_grad():
            return _log_softmax(self.head.logits(self.hidden, self.made), vocabulary, temperature)


@dataclass(frozen=True)
class TopK(Distribution):
    """The teacher's K most likely tokens at temperature 1, and what becomes of the rest.

    `tail` names the treatment: `bucket` adds one outcome holding all other tokens on both sides, tempered as a uniform
    tail (this project's derivation, `_tempered_tail`); `renormalise` restricts both sides to the K tokens; `drop` is the
    bucket without its last outcome: the K tokens at their own mass (not a divergence, may be negative).
    """

    ids: Tensor
    """`(N, K)` int64, sorted by falling teacher probability, all of them ids of the student."""
    logprobs: Tensor
    """`(N, K)` float32 natural log-probabilities at temperature 1."""
    tail: Tail = "bucket"

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"pair", "expectation"})

    @property
    def whole(self) -> bool:
        return self.tail != "drop"

    def chunk(self, start: int, stop: int) -> TopK:
        return TopK(self.ids[start:stop], self.logprobs[start:stop], self.tail)

    def student(self, outputs: TokenLogits, temperature: float) -> Tensor:
        want_tail = self.tail == "bucket" and self.ids.shape[-1] < outputs.logits.shape[-1]
        inside, outside = outputs.partition(self.ids, temperature, want_tail)
        if outside is not None:
            return torch.cat([inside, outside], dim=-1)
        return inside.log_softmax(-1) if self.tail == "renormalise" else inside

    def teacher(self, vocabulary: int, temperature: float) -> Tensor:
        kept = self.ids.shape[-1]
        log_p = self.logprobs.detach().float() / temperature
        if self.tail == "renormalise" or kept >= vocabulary:
            return log_p.log_softmax(-1)
        log_p = torch.cat([log_p, self._tempered_tail(vocabulary, temperature)], dim=-1).log_softmax(-1)
        return log_p if self.tail == "bucket" else log_p[:, :kept]

    def label_logprobs(self, outputs: TokenLogits) -> NoReturn:
        raise _refusal(self, "label")  # a token outside the K has no probability of its own

    def first(self, outputs: TokenLogits, k: int) -> Tensor:
        return self.ids[:, :k]

    def kept_mass(self, outputs: TokenLogits) -> tuple[Tensor, Tensor]:
        inside, _ = outputs.partition(self.ids, 1.0, want_tail=False)
        return torch.logsumexp(inside, -1).exp(), self.logprobs.detach().exp().sum(-1)

    def _tempered_tail(self, vocabulary: int, temperature: float) -> Tensor:
        """Unnormalised log weight of the bucket: `(V-K)^(1-1/T) r^(1/T)`, exact for a uniform tail. `(N, 1)`."""
        tail = (1.0 - self.logprobs.detach().double().exp().sum(-1, keepdim=True)).clamp_min(TAIL_FLOOR)
        spread = (1.0 - 1.0 / temperature) * math.log(vocabulary - self.ids.shape[-1])
        return (tail.log() / temperature + spread).float()


class Scarce:
    """What is less than a distribution: it refuses everything that it does not define."""

    @property
    def whole(self) -> bool:
        return False

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        raise _refusal(self, "pair")

    def expect(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        raise _refusal(self, "expectation")

    def label_logprobs(self, outputs: TokenLogits) -> Tensor:
        raise _refusal(self, "label")

    def first(self, outputs: TokenLogits, k: int) -> Tensor:
        raise _refusal(self, "pair")

    def kept_mass(self, outputs: TokenLogits) -> tuple[Tensor, Tensor]:
        raise _refusal(self, "pair")


@dataclass(frozen=True)
class Sampled(Scarce):
    """Tokens drawn from the teacher, for averages under it: random-sampling distillation (arXiv:2503.16870).

    n draws x_j from a proposal r, with replacement, weigh `w_j = p(x_j) / (n r(x_j))`, so that `sum_j w_j f(x_j)` is unbiased
    for `sum_v p_v f(v)`, and forward KL with its gradient too. Equal draws need no merging; a weight of 0 pads a short row.
    """

    ids: Tensor
    """`(N, n)` int64."""
    logprobs: Tensor
    """`(N, n)` float32 the teacher's natural log-probabilities of the draws at temperature 1."""
    weights: Tensor
    """`(N, n)` float32."""

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"expectation"})

    def chunk(self, start: int, stop: int) -> Sampled:
        return Sampled(self.ids[start:stop], self.logprobs[start:stop], self.weights[start:stop])

    def expect(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        if temperature != 1.0:
            raise ValueError(f"Sampled was drawn at temperature 1 and is read at {temperature:g}; expected 1, or Dense, Hidden or TopK")
        log_q, _ = outputs.partition(self.ids, 1.0, want_tail=False)
        return self.weights.detach(), log_q, self.logprobs.detach()


@dataclass(frozen=True)
class PerToken(Scarce):
    """The teacher's log-probability of each given token and nothing else, for estimators on sampled tokens."""

    logprobs: Tensor
    """`(N,)` float32 natural logarithms at the temperature of whoever wrote the tokens."""

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"label"})

    def chunk(self, start: int, stop: int) -> PerToken:
        return PerToken(self.logprobs[start:stop])

    def label_logprobs(self, outputs: TokenLogits) -> Tensor:
        return self.logprobs.detach().float()


def _refusal(signal: object, reads: Reads) -> ValueError:
    return ValueError(f"{type(signal).__name__} cannot give what was asked; expected {WOULD_WORK[reads]}")


def _log_softmax(logits: Tensor, vocabulary: int, temperature: float) -> Tensor:
    """Tempered log-probabilities `(N, V)` float32 over the student's ids, of teacher logits `(N, V')`."""
    shared = logits[:, :vocabulary].float()
    shared = shared if temperature == 1.0 else shared / temperature
    log_p = shared - shared.logsumexp(-1, keepdim=True)  # as the student's: equal logits then agree to the last bit
    missing = vocabulary - shared.shape[-1]
    return torch.nn.functional.pad(log_p, (0, missing), value=-torch.inf) if missing else log_p
