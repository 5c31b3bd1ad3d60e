"""Sampled-token divergences: what one log-probability per token of the student's own text can teach.

Every estimator is named by the gradient that it gives in expectation over tokens y drawn from the student q
`d = log p(y) - log q(y)`, the teacher's advantage on the token, never carries a gradient here.
The token must have been drawn from q at `temperature`, and the signal's log-probabilities must have been taken at the
same one, which is 1 for every signal of a run, so that a plan refuses any other; neither can be checked here. Text of
anybody else makes all of them biased.

| backpropagated | expected gradient | expected value | type |
|---|---|---|---|
| -d log q | reverse KL | reverse KL (k1) | `reverse-kl-policy-gradient` |
| -(d + what follows) log q | reverse KL of sequences | reverse KL (k1) | `reverse-kl-reward-to-go` |
| k2 = d^2 / 2 | reverse KL | not a divergence; close to it when p is near q | `reverse-kl-squared` |
| k3 = e^d - 1 - d | **forward** KL | reverse KL | `forward-kl-k3` |
| k1 = -d | 0 | reverse KL | refused |

k1, k2, k3: J. Schulman, *Approximating KL divergence*, 2020.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from strategies.acted import acted
from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenBatch, TokenLogits
from strategies.objectives.base import RATIO_LIMIT
from strategies.objectives.parts import advantage, student_label_logprobs, surrogate, teacher_label_logprobs, token_rows
from strategies.schedule import PositiveSchedule, Share, schedule
from strategies.signals import Signal

Temperature = Annotated[float, Field(gt=0)]
"""Fixed over the run, unlike that of a divergence: the signal's numbers were taken at one temperature."""


def k1(log_ratios: Tensor) -> Tensor:
    """`-d`: unbiased for KL(q || p) over y ~ q, of either sign. For logging."""
    return -log_ratios


def k2(log_ratios: Tensor) -> Tensor:
    """`d^2 / 2`: biased as a value, never negative, of low variance."""
    return 0.5 * log_ratios.square()


def k3(log_ratios: Tensor) -> Tensor:
    """`e^d - 1 - d`: unbiased for KL(q || p) over y ~ q where q covers p, never negative. For logging."""
    return torch.expm1(log_ratios) - log_ratios


def clipped(log_ratios: Tensor, limit: PositiveSchedule | None, progress: Progress) -> Tensor:
    """`d` within `[-limit, limit]`; unchanged when there is no limit."""
    if limit is None:
        return log_ratios
    bound = schedule(limit)(progress)
    return log_ratios.clamp(-bound, bound)


def clipped_surrogate(log_q: Tensor, log_behaviour: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """`-min(r A, clamp(r, 1 - low, 1 + high) A)` per token, `(N,)`, r = q / q_behaviour. Schulman et al., arXiv:1707.06347, eq. 7.

    For several updates on one rollout. `log_q` carries the gradient; the other two, `(N,)`, do not. A ratio beyond
    `exp(RATIO_LIMIT)` is held there and passes none.
    """
    ratio = (log_q - log_behaviour.detach()).clamp(max=RATIO_LIMIT).exp()
    gain = advantages.detach()
    return -torch.minimum(ratio * gain, ratio.clamp(1.0 - low, 1.0 + high) * gain)


def reward_to_go(rewards: Tensor, rows: Tensor, discount: float) -> Tensor:
    """`G_t = sum over t' >= t of discount^(t' - t) r_t'` within each token's row, `(N,)`.

    Tokens of a row stand in order; rows may interleave. `discount` 0 gives the rewards themselves. O(N log N), in one
    rounding-safe scan that never forms `discount^-t`.
    """
    order = torch.argsort(rows, stable=True)
    total, row = rewards[order], rows[order]
    reach = 1
    while reach < len(row):
        later = torch.where(row[reach:] == row[:-reach], total[reach:], 0.0)
        total = torch.cat([total[:-reach] + discount**reach * later, total[-reach:]])
        reach *= 2
    return torch.empty_like(total).scatter(0, order, total)


def next_in_row(values: Tensor, rows: Tensor) -> Tensor:
    """What stands at the next token of the same row, `(N,)`; 0 at a row's last one."""
    order = torch.argsort(rows, stable=True)
    row, result = rows[order], torch.zeros_like(values)
    follows = torch.where(row[1:] == row[:-1], values[order][1:], 0.0)
    return result.scatter(0, order[:-1], follows)


def importance(log_q: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """`min(q / q_behaviour, cap)`, `(N,)` without gradient: truncated weights of tokens that something else than q wrote."""
    return (log_q.detach() - behaviour.detach()).exp().clamp(max=cap)


def mixed_importance(log_ratios: Tensor, teacher_share: float) -> Tensor:
    """`q / ((1 - a) q + a p)`, `(N,)`, of `d = log p - log q`: weights of tokens drawn from that mixture, at most 1 / (1 - a).

    Gu et al., arXiv:2306.08543, section 2.2, with each token weighed by its own ratio alone.
    """
    return 1.0 / ((1.0 - teacher_share) + teacher_share * log_ratios.exp())


class ReverseKLPolicyGradient(ObjectiveSettings):
    """Token-level reverse KL by policy gradient: the gradient of `-sg[d] log q(y)`, weighted and summed.

    Gu et al., arXiv:2306.08543, without the effect of a token on later ones;
    `ReverseKLRewardToGo` has it. The **value** is k1, the unclipped `-d`: an unbiased and loggable estimate of the
    divergence, where `-d log q` itself would mean nothing. It has no ratio to a behaviour policy: one update per
    rollout. A teacher that rules out a sampled token makes d infinite; `clip` bounds it.
    """

    reads: ClassVar[Reads] = "label"
    type: Literal["reverse-kl-policy-gradient"] = "reverse-kl-policy-gradient"
    temperature: Temperature = 1.0
    """Of the policy that wrote the tokens, and of the signal's log-probabilities."""
    clip: PositiveSchedule | None = None
    """Largest |d| that drives the gradient, in nats; None leaves the estimator unbiased."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        log_q = student_label_logprobs(outputs, self.temperature)
        d = _advantages(log_q, outputs, signal, weights, self.type)
        return surrogate(weights * k1(d), weights * -clipped(d, self.clip, progress), log_q)


class ReverseKLRewardToGo(ObjectiveSettings):
    """Sequence-level reverse KL by policy gradient: the gradient of `-sg[G_t] log q(y_t)`, G the discounted sum of d from t on.

    Gu et al., arXiv:2306.08543, section 2.2, which is this at `discount` 1. The whole of
    MiniLLM is `later_only` beside `reverse-kl`, which is the single step in closed form, with `length_normalised` and a
    `teacher_share` of 0.2; the single step then stays without its importance weight. Its released code doubles d and cuts it at
    100: that is `clip` 50 and twice the term's weight.

    The **value** is k1 of each token, uncut, as in `ReverseKLPolicyGradient`, times the token's importance weight where there is
    one: it estimates the divergence of sequences, whatever G is. Looks at whole rows of the micro-batch; rows are never split
    over micro-batches, so the result does not depend on how a step is split. Tokens of weight 0 earn no d and count in no
    length, and tokens that carry no loss take no step of discount. No baseline is subtracted, and nothing is whitened. It
    has no ratio that is cut, so several updates on one text need `importance_cap`, which weighs a token by its own ratio and not
    by that of its prefix.
    """

    reads: ClassVar[Reads] = "label"
    type: Literal["reverse-kl-reward-to-go"] = "reverse-kl-reward-to-go"
    temperature: Temperature = 1.0
    """Of the policy that wrote the tokens, and of the signal's log-probabilities."""
    clip: PositiveSchedule | None = None
    """Largest |d| of a token that is summed, in nats; None leaves the estimator unbiased."""
    discount: Share = 1.0
    """What a reward one loss token later is worth; 0 is `reverse-kl-policy-gradient`."""
    later_only: bool = False
    """Whether a token's own d is left out, which `reverse-kl` beside it holds in closed form."""
    length_normalised: bool = False
    """Whether the sum is divided by its number of tokens, so that early ones do not outweigh late ones."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """a: share of the teacher in the mixture `(1 - a) q + a p` that the tokens were drawn from; weighs each by `q / mixture`."""
    importance_cap: PositiveFloat | None = None
    """Largest weight `q / behaviour` of a token, whose signal tells the log-probability under what wrote it; None: no such weights."""

    @model_validator(mode="after")
    def _one_correction(self) -> ReverseKLRewardToGo:
        if self.importance_cap is not None and (self.teacher_share or self.temperature != 1.0):
            raise ValueError("expected importance_cap without teacher_share, at temperature 1: `behaviour` is that of what wrote the token")
        return self

    def also_reads(self) -> frozenset[Reads]:
        return frozenset() if self.importance_cap is None else frozenset({"acted"})

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        log_q = student_label_logprobs(outputs, self.temperature)
        d = advantage(teacher_label_logprobs(signal, outputs, self.type), log_q)
        return torch.stack([d, self._importance(d, log_q, signal)], -1)

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        live = weights != 0
        d, importances = torch.where(live[:, None], surveyed, 0.0).unbind(-1)
        rows = token_rows(batch.rows, len(d), d.device, self.type)
        to_go = self._to_go(clipped(d, self.clip, progress), rows, schedule(self.discount)(progress))
        if self.length_normalised:
            to_go = to_go / self._to_go(live.to(d.dtype), rows, 1.0).clamp_min(1.0)
        return importances[:, None] * torch.stack([k1(d), -to_go], -1)

    def _importance(self, d: Tensor, log_q: Tensor, signal: Signal | None) -> Tensor:
        """Weights `(n,)` for tokens that something else than the student in hand wrote; 1 where that is not asked."""
        if self.importance_cap is not None:
            return importance(log_q, acted(signal, self.type).behaviour, self.importance_cap)
        return mixed_importance(d, self.teacher_share) if self.teacher_share else torch.ones_like(d)

    def _to_go(self, rewards: Tensor, rows: Tensor, discount: float) -> Tensor:
        to_go = reward_to_go(rewards, rows, discount)
        return discount * next_in_row(to_go, rows) if self.later_only else to_go

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        log_q = student_label_logprobs(outputs, self.temperature)
        return surrogate(weights * numbers[:, 0], weights * numbers[:, 1], log_q)


class ReverseKLSquared(ObjectiveSettings):
    """Reverse KL by the square: `d^2 / 2` backpropagated (k2), weighted and summed.

    Its gradient is `-d grad log q(y)`, token for token that of `ReverseKLPolicyGradient`; it differs in the value it
    reports, which is never negative, and which a term beside it (KDRL's penalty) adds to its own.
    """

    reads: ClassVar[Reads] = "label"
    type: Literal["reverse-kl-squared"] = "reverse-kl-squared"
    temperature: Temperature = 1.0
    """Of the policy that wrote the tokens, and of the signal's log-probabilities."""
    clip: PositiveSchedule | None = None
    """Largest |d|, in value and gradient, in nats; None leaves the estimator unbiased."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        log_q = student_label_logprobs(outputs, self.temperature)
        d = clipped(_advantages(log_q, outputs, signal, weights, self.type), self.clip, progress)
        return surrogate(weights * k2(d), weights * -d, log_q)


class ForwardKLK3(ObjectiveSettings):
    """Forward KL from the student's own tokens: `k3 = e^d - 1 - d` backpropagated, weighted and summed.

    Its value estimates the **reverse** KL, its gradient `-(e^d - 1) grad log q(y)` is that of the **forward** one, by
    importance weights p/q: heavy-tailed wherever q is far below p. `clip` bounds e^d, which overflows float32 at d = 88.
    """

    reads: ClassVar[Reads] = "label"
    type: Literal["forward-kl-k3"] = "forward-kl-k3"
    temperature: Temperature = 1.0
    """Of the policy that wrote the tokens, and of the signal's log-probabilities."""
    clip: PositiveSchedule | None = None
    """Largest |d|, in value and gradient, in nats; None leaves the estimator unbiased."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        log_q = student_label_logprobs(outputs, self.temperature)
        d = clipped(_advantages(log_q, outputs, signal, weights, self.type), self.clip, progress)
        return surrogate(weights * k3(d), weights * -torch.expm1(d), log_q)


class RefusedK1(ObjectiveSettings):
    """The name under which k1 is refused: `-d` backpropagated is `grad log q`, whose expectation over q is 0."""

    type: Literal["reverse-kl-k1"] = "reverse-kl-k1"

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        raise ValueError(
            "reverse-kl-k1 teaches nothing: the gradient of k1 = log q - log p averages to 0 over the student's own tokens. "
            "Take reverse-kl-policy-gradient, whose value is k1 and whose gradient is the reverse KL's"
        )


def _advantages(log_q: Tensor, outputs: TokenLogits, signal: Signal | None, weights: Tensor, reader: str) -> Tensor:
    """`d` of each token, `(N,)` without gradient; 0 where the weight is 0, whatever stands there."""
    return torch.where(weights != 0, advantage(teacher_label_logprobs(signal, outputs, reader), log_q), 0.0)
