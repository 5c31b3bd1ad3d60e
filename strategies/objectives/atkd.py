"""ATKD: forward KL split at the given token, and taught differently where the teacher is sure of it and where it is not.

Zhong et al., arXiv:2402.11890, on the decomposition of Zhao et al., arXiv:2203.08679:
`KL(p || q) = TCKD + (1 - p_y) NCKD`, TCKD the divergence of "y or not y", NCKD that of the other tokens among themselves.

Of a top-k signal, a token outside the kept ones is looked for in the bucket: the split is then between the bucket and the
kept tokens, and p_y is taken as the smaller of the bucket's mass and the last kept token's, its upper bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenBatch, TokenLogits
from strategies.objectives.divergence import forward_kl, reverse_kl
from strategies.objectives.token_weighting import quantile_of, single_tokens
from strategies.schedule import Share, schedule
from strategies.signals import Signal, given

Direction = Literal["forward", "reverse"]
DIRECTIONS: dict[Direction, Callable[[Tensor, Tensor], Tensor]] = {"forward": forward_kl, "reverse": reverse_kl}


def label_column(signal: Signal, labels: Tensor, outcomes: int, vocabulary: int) -> Tensor:
    """Which of a signal's M outcomes each label `(N,)` is, `(N,)` int64: its own, the bucket, or M when it is none of them.

    `ValueError` for a signal whose outcomes are neither the vocabulary nor listed by `ids`.
    """
    ids = getattr(signal, "ids", None)
    if not isinstance(ids, Tensor):
        if outcomes != vocabulary:
            raise ValueError(f"{type(signal).__name__} gives {outcomes} outcomes of {vocabulary} tokens and does not say which")
        return labels
    match = ids == labels[:, None]
    elsewhere = single_tokens(signal, outcomes)  # the bucket where there is one, and M where there is none
    return torch.where(match.any(-1), match.int().argmax(-1), elsewhere)


def dkd_parts(log_q: Tensor, log_p: Tensor, column: Tensor, direction: Direction = "forward") -> tuple[Tensor, Tensor]:
    """TCKD and NCKD, each `(N,)`, of log-probabilities `(N, M)` split at outcome `column` `(N,)`.

    `KL(p || q) = TCKD + (1 - p_y) NCKD` where both sides sum to 1; `reverse` swaps the roles. NCKD is 0 where the side
    that averages puts nothing on other outcomes; column M, no outcome, makes TCKD 0 and NCKD the whole divergence.
    """
    divergence = DIRECTIONS[direction]
    (binary_q, others_q), (binary_p, others_p) = _split(log_q, column), _split(log_p, column)
    average = binary_p if direction == "forward" else binary_q
    others = torch.where(average[:, 1] > -torch.inf, divergence(others_q, others_p), 0.0)
    return divergence(binary_q, binary_p), others


def _split(log: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the outcome and of all others together, `(N, 2)`, and of each other given these, `(N, M)`."""
    known, at = (column < log.shape[-1])[:, None], column.clamp_max(log.shape[-1] - 1)[:, None]
    here = log.gather(-1, at)
    others = log.scatter(-1, at, torch.where(known, -torch.inf, here))
    nothing = others.amax(-1, keepdim=True) == -torch.inf
    rest = torch.where(nothing, 0.0, others).logsumexp(-1, keepdim=True)  # -inf alone has no gradient
    binary = torch.cat([torch.where(known, here, -torch.inf), torch.where(nothing, -torch.inf, rest)], -1)
    return binary, others - torch.where(nothing, 0.0, rest)


def uncertainty(outputs: TokenLogits, signal: Signal, direction: Direction) -> Tensor:
    """`1 - p(y)`, `(n,)` float32 without gradient, at temperature 1; of the student, on its whole vocabulary, where roles are swapped."""
    if direction == "reverse":
        return -torch.expm1(outputs.label_logprobs()).detach()
    _, log_p = signal.pair(outputs, 1.0)
    outcomes, tokens = log_p.shape[-1], single_tokens(signal, log_p.shape[-1])
    column = label_column(signal, outputs.labels, outcomes, outputs.logits.shape[-1])
    log_y = log_p.gather(-1, column.clamp_max(outcomes - 1)[:, None])[:, 0]
    log_y = torch.where(column < tokens, log_y, torch.minimum(log_y, log_p[:, :tokens].amin(-1)))
    return -torch.expm1(torch.where(column < outcomes, log_y, -torch.inf)).detach()


def _sum(outputs: TokenLogits, signal: Signal, weights: Tensor, coefficients: Tensor, direction: Direction) -> Tensor:
    """Sum of NCKD and TCKD by `coefficients` `(n, 2)`; a token of weight 0 adds nothing, whatever stands there."""
    log_q, log_p = signal.pair(outputs, 1.0)
    column = label_column(signal, outputs.labels, log_p.shape[-1], outputs.logits.shape[-1])
    tckd, nckd = dkd_parts(log_q, log_p, column, direction)
    by_nckd, by_tckd = (weights[:, None] * coefficients).unbind(-1)
    return (by_nckd * torch.where(by_nckd != 0, nckd, 0.0) + by_tckd * torch.where(by_tckd != 0, tckd, 0.0)).sum()


class ATKD(ObjectiveSettings):
    """Sum whose mean over the mask is `lambda mean_easy(NCKD) + (1 - lambda) mean_hard(TCKD + NCKD)`, at temperature 1.

    arXiv:2402.11890. A token is easy when `u = 1 - p(y)` is below the micro-batch's `quantile` of u, over tokens with a
    weight. Each mean is over its own tokens of the micro-batch, so value and split depend on how a step is cut into
    micro-batches: the step's value is the mean of the micro-batches' by their tokens. A group without tokens adds 0.
    `ATKDAbsolute` does not depend on the cut.
    """

    reads: ClassVar[Reads] = "pair"
    type: Literal["atkd"] = "atkd"
    easy_weight: Share = 0.2
    """Lambda: weight of the easy tokens' mean."""
    quantile: Share = 0.5
    """Share of the tokens that are easy."""
    direction: Direction = "forward"
    """KL(p || q), or KL(q || p) with the roles of teacher and student swapped, also in u."""

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        return uncertainty(outputs, given(signal, self.reads, self.type), self.direction)[:, None]

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        u, live = surveyed[:, 0], weights != 0
        easy = live & (u < quantile_of(u[live], schedule(self.quantile)(progress)))
        hard, share = live & ~easy, schedule(self.easy_weight)(progress)
        by_easy, by_hard = (s * live.sum() / group.sum().clamp_min(1) * group for s, group in ((share, easy), (1.0 - share, hard)))
        return torch.stack([by_easy + by_hard, by_hard], -1)

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        return _sum(outputs, given(signal, self.reads, self.type), weights, numbers, self.direction)


class ATKDAbsolute(ObjectiveSettings):
    """ATKD with a fixed border: sum of `2 lambda NCKD` on easy tokens and `2 (1 - lambda) (TCKD + NCKD)` on hard ones.

    Equal to `ATKD` where half of the tokens are easy. It adds up over tokens: one pass, whatever the split.
    """

    reads: ClassVar[Reads] = "pair"
    type: Literal["atkd-absolute"] = "atkd-absolute"
    easy_weight: Share = 0.2
    """Lambda: weight of the easy tokens."""
    threshold: Share = 0.5
    """A token is easy when `u = 1 - p(y)` is below it. Not from the paper: the median of u depends on teacher and text."""
    direction: Direction = "forward"
    """KL(p || q), or KL(q || p) with the roles of teacher and student swapped, also in u."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        teacher, share = given(signal, self.reads, self.type), schedule(self.easy_weight)(progress)
        easy = uncertainty(outputs, teacher, self.direction) < schedule(self.threshold)(progress)
        by_hard = torch.where(easy, 0.0, 2.0 * (1.0 - share))
        return _sum(outputs, teacher, weights, torch.stack([torch.where(easy, 2.0 * share, by_hard), by_hard], -1), self.direction)
