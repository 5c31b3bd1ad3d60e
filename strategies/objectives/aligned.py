"""Objectives for a teacher with another tokenizer, on spans that cover the same bytes on both sides."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import pad

from strategies.aligned import BoundedSpans, ForeignTopK, SpanLikelihoods
from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenBatch, TokenLogits
from strategies.objectives.base import weighted_sum
from strategies.objectives.mixtures import JSD
from strategies.objectives.transport import snapped
from strategies.schedule import Share
from strategies.signals import TAIL_FLOOR, Signal, given

SUREST = -1e-6
"""Largest log-probability of a span: that of the span's opposite is finite then."""
LEAST = -1e6
"""Smallest log-probability of a span."""
Distance = Literal["kl", "reverse-kl", "total-variation"]


def span_distance(log_q: Tensor, log_p: Tensor, temperature: float, distance: Distance) -> tuple[Tensor, Tensor]:
    """Values and slopes with respect to `log_q`, both `(C,)` float64, of `tau D` between `(P, 1 - P)` and `(Q, 1 - Q)`.

    `P = exp(log_p / tau)` and `Q = exp(log_q / tau)`, of log-probabilities of C spans.
    """
    a, b = (log.double().clamp(LEAST, SUREST) / temperature for log in (log_p, log_q))
    p, q = a.exp(), b.exp()
    against_p, against_q = ((-torch.expm1(x)).log() for x in (a, b))
    if distance == "kl":
        value = p * (a - b) + (1 - p) * (against_p - against_q)
        slope = (q - p) / -torch.expm1(b)
    elif distance == "reverse-kl":
        value = q * (b - a) + (1 - q) * (against_q - against_p)
        slope = q * ((b - a) - (against_q - against_p))
    else:
        value, slope = (p - q).abs(), (q - p).sign() * q
    return temperature * value, slope


class SpanLikelihood(ObjectiveSettings):
    """Weighted sum over the tokens of aligned spans of `tau D` between the span's binarised likelihoods on both sides.

    Approximate likelihood matching, Minixhofer et al., arXiv:2503.20083: with l the sum of a span's log-probabilities, `P = exp(l_p /
    tau)`, `Q = exp(l_q / tau)`, and D between `(P, 1 - P)` and `(Q, 1 - Q)`. A span counts by the weights of its student tokens. tau
    multiplies D, so that its gradient keeps its size as tau grows; KL then tends to `(b - a) + a log(a / b)` with `a = -l_p`, `b =
    -l_q`. Where both tokenizers agree, spans are tokens. A span must be in one micro-batch, as it is: rows are never cut. With
    `BoundedSpans`, l is that of the span and of a new unit of text behind it, wherever both networks say how likely that is: a token that
    ends where a span ends is not taken for one that might have gone on (outcome chunk debiasing there). Without, that bias remains.
    """

    reads: ClassVar[Reads] = "spans"
    type: Literal["span-likelihood"] = "span-likelihood"
    distance: Distance = "kl"
    """D: `kl`, weighed by the teacher, `reverse-kl`, or `total-variation`, the absolute difference."""
    temperature: PositiveFloat = 100.0
    """tau; 1 compares the likelihoods themselves, which are tiny for long spans."""

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        """Log-probability of the token, its span, and the teacher's number, `(n, 3)`; with `BoundedSpans` also the log-probabilities of a
        new unit at the token, its own and the teacher's, `(n, 5)`."""
        found = _spans(signal, self.type)
        numbers = [outputs.label_logprobs(), found.span.float(), found.logprobs.float()]
        if isinstance(found, BoundedSpans):
            numbers += [_begins(outputs, found), found.begins.float()]
        return torch.stack(numbers, -1)

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        """The value of the token's span, and what of the whole sum is the slope of the token's log-probability, `(N, 2)`; with a third
        column, the slope of a new unit's at the token, where the span before it is bounded by it."""
        own, span, theirs, *begins = surveyed.double().unbind(-1)
        _, number = torch.unique_consecutive(span, return_inverse=True)
        sums = torch.zeros((3, int(number[-1]) + 1), dtype=torch.float64, device=own.device)
        sums.index_add_(1, number, torch.stack([own, theirs, weights.double()]))
        told = (begins[1] <= 0).nonzero()[:, 0] if begins else span.new_zeros(0).long()
        bounded = number[told - 1]
        if begins:
            sums.index_add_(1, bounded, torch.stack([begins[0][told], begins[1][told], torch.zeros_like(begins[0][told])]))
        value, slope = span_distance(sums[0], sums[1], self.temperature, self.distance)
        moved = sums[2] * slope
        found = [value[number], moved[number]]
        if begins:
            found.append(torch.zeros_like(own).index_copy(0, told, moved[bounded]))
        return torch.stack(found, -1).float()

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        """See `strategies.core.TwoPass`."""
        own, found = outputs.label_logprobs(), _spans(signal, self.type)
        total = weighted_sum(numbers[:, 0], weights) + weighted_sum(own - own.detach(), numbers[:, 1])
        if isinstance(found, BoundedSpans):
            begins = _begins(outputs, found)
            total = total + weighted_sum(begins - begins.detach(), numbers[:, 2])
        return total


def _begins(outputs: TokenLogits, signal: BoundedSpans) -> Tensor:
    """The student's log-probability of a token that begins a unit of text, `(n,)`."""
    each, _ = outputs.partition(signal.own.expand(len(outputs.labels), -1), 1.0, want_tail=False)
    return each.logsumexp(-1).clamp_min(LEAST)


def _spans(signal: Signal | None, reader: str) -> SpanLikelihoods:
    found = given(signal, "spans", reader)
    assert isinstance(found, SpanLikelihoods)
    return found


def _foreign(signal: Signal | None, reader: str) -> ForeignTopK:
    found = given(signal, "foreign", reader)
    assert isinstance(found, ForeignTopK)
    return found


class SharedTokens(ObjectiveSettings):
    """Weighted sum over first tokens of spans of the Jensen-Shannon divergence on the tokens that both vocabularies have.

    The part of GOLD (TRL's `GOLDTrainer`) for exactly mapped ids: the teacher's kept tokens that the student has with the very same
    bytes or in the same special role are an outcome each, and everything else is one outcome together on either side, so that both
    sides add up to one. `beta` weighs the teacher: 0 is forward KL, 1 reverse KL. What the two have in common but outside the kept
    tokens counts to the rest.
    """

    reads: ClassVar[Reads] = "foreign"
    type: Literal["shared-tokens"] = "shared-tokens"
    beta: Share = 0.5
    """Weight of the teacher in the mixture that both are compared with."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        found = _foreign(signal, self.type)
        log_q, log_p = shared_pair(outputs, found.ids, found.kept)
        return weighted_sum(JSD(beta=self.beta).between(log_q, log_p, progress), weights)


def shared_pair(outputs: TokenLogits, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(log q, log p) `(n, K + 1)` on shared tokens and the rest; -inf on both sides for a kept token that is not shared."""
    alike = ids >= 0
    own = outputs.picked(ids.clamp_min(0)) - outputs.normaliser()
    sides = (own.masked_fill(~alike, -torch.inf), kept.masked_fill(~alike, -torch.inf))
    rest = [(1.0 - s.exp().sum(-1, keepdim=True)).clamp_min(TAIL_FLOOR).log() for s in sides]
    return torch.cat([sides[0], rest[0]], -1), torch.cat([sides[1].float(), rest[1]], -1)


class AlignedULD(ObjectiveSettings):
    """Weighted sum over first tokens of spans of `sum |sort p - sort q|`: universal logit distillation across two vocabularies.

    Boizard et al., arXiv:2402.12030, at positions where both networks have read the same bytes, instead of at equal numbers. The
    teacher's K kept tokens are compared with the student's K likeliest, and what is left of both as one more number, which is a lower
    bound, exact for K of its whole vocabulary. It is blind to *which* token is likely, so never use it alone.
    """

    reads: ClassVar[Reads] = "foreign"
    type: Literal["aligned-uld"] = "aligned-uld"
    without_shared: bool = False
    """Leaves out the teacher's kept tokens that the student has too, and the student's of the same bytes: the rest of GOLD."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        found = _foreign(signal, self.type)
        ids = found.ids if self.without_shared else torch.full_like(found.ids, -1)
        return weighted_sum(foreign_uld(outputs, ids, found.kept), weights)


def foreign_uld(outputs: TokenLogits, ids: Tensor, kept: Tensor) -> Tensor:
    """`sum |sort p - sort q|` `(n,)` over the teacher's kept tokens with id -1 and all of the student's but `ids` `(n, K)`."""
    shared, vocabulary = ids >= 0, outputs.logits.shape[-1]
    p = torch.where(shared, 0.0, kept.detach().float().exp()).sort(-1, descending=True).values
    taken = torch.where(shared, kept.detach().float().exp(), 0.0).sum(-1)
    left_out = shared.new_zeros(len(ids), vocabulary + 1).scatter_(-1, torch.where(shared, ids, vocabulary), True)[:, :vocabulary]
    free = outputs.logprobs().exp().masked_fill(left_out, 0.0)
    q = free.topk(min(ids.shape[-1], vocabulary), -1).values
    rest_p, rest_q = (1.0 - taken - p.sum(-1)).clamp_min(0.0), free.sum(-1) - q.sum(-1)
    q = pad(q, (0, p.shape[-1] - q.shape[-1]))
    return (p - snapped(q, p)).abs().sum(-1) + (rest_p - snapped(rest_q, rest_p)).abs()
