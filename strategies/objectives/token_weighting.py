"""Which tokens teach: weights made from how sure teacher and student are, around any divergence of single tokens.

A wrapper multiplies the term's weights by numbers under stop-gradient and calls the `divergence` it holds. Each comes
twice:

- `selected-tokens` cuts at a **quantile of the micro-batch**: it takes two passes, and its result depends on how a step is
  split into micro-batches, which is not the same at another world size or token budget;
- `selected-tokens-absolute` cuts at a number, in one pass, and does not depend on the split.

The mask count stays the denominator, so a term that keeps half of its tokens has about half of its
size; `average: kept` makes it the mean over the kept ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import AfterValidator, BeforeValidator, InstanceOf, SerializeAsAny
from torch import Tensor

from strategies.core import Objective, ObjectiveSettings, Progress, Reads, TwoPass
from strategies.cut import Together
from strategies.head import TokenBatch, TokenLogits
from strategies.objectives.divergence import ForwardKL, total_variation
from strategies.schedule import PositiveSchedule, ScheduleConfig, Share, schedule
from strategies.signals import Signal, given

Score = Literal["student-entropy", "teacher-entropy", "student-confidence", "teacher-confidence", "entropy-gap", "distance"]
"""What is measured of a token, at temperature 1: entropies in nats; confidence, the largest probability of one token;
`entropy-gap`, the student's entropy minus the teacher's; `distance`, the total variation between the two, 0 to 1."""
Side = Literal["above", "below"]


def _as_objective(value: Any) -> Any:
    """Settings given as a mapping become the objective that their `type` names; others pass through."""
    if not isinstance(value, Mapping):
        return value
    from strategies.objectives import OBJECTIVES  # which imports this file

    if value.get("type") not in OBJECTIVES:
        raise ValueError(f"got the type {value.get('type')!r}; expected one of {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[value["type"]].model_validate(value)


def _of_single_tokens(value: ObjectiveSettings) -> ObjectiveSettings:
    if isinstance(value, TwoPass):
        raise ValueError(f"{value.type} looks at whole micro-batches itself; expected a divergence of single tokens")
    if isinstance(value, Together) or value.reads not in ("nothing", "expectation", "pair"):
        raise ValueError(f"{value.type} is no sum over tokens of what each is by itself; expected a divergence of single tokens")
    return value


Inner = Annotated[SerializeAsAny[InstanceOf[ObjectiveSettings]], BeforeValidator(_as_objective), AfterValidator(_of_single_tokens)]
"""Settings of another objective that adds up over tokens: `{type: forward-kl, temperature: 2}`."""


def apply(divergence: ObjectiveSettings, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
    """The sum of a wrapped objective."""
    return cast(Objective, divergence)(outputs, signal, weights, progress)


def entropy(logprobs: Tensor) -> Tensor:
    """`-sum p log p` in nats of log-probabilities `(N, M)`, `(N,)`, with 0 log 0 = 0, in its gradient too."""
    p = logprobs.exp()
    return -(p * torch.where(p > 0, logprobs, 0.0)).sum(-1)


def single_tokens(signal: Signal, outcomes: int) -> int:
    """How many of a signal's outcomes are one token each: all, or all but the last, which holds the rest of the vocabulary."""
    ids = getattr(signal, "ids", None)
    return outcomes - 1 if isinstance(ids, Tensor) and ids.shape[-1] == outcomes - 1 else outcomes


def score(kind: Score, outputs: TokenLogits, signal: Signal | None, reader: str) -> Tensor:
    """`(n,)` float32 of each token, without gradient.

    The student alone is measured on its whole vocabulary, whatever the signal cuts off. Detached afterwards and not
    computed under `no_grad`: `outputs` keeps what it computes, and the divergence needs that with its gradient.
    """
    if kind == "student-entropy":
        return entropy(outputs.logprobs()).detach()
    if kind == "student-confidence":
        return outputs.logprobs().amax(-1).exp().detach()
    signal = given(signal, "pair", reader)
    log_q, log_p = signal.pair(outputs, 1.0)
    if kind == "teacher-entropy":
        return entropy(log_p).detach()
    if kind == "teacher-confidence":
        return log_p[:, : single_tokens(signal, log_p.shape[-1])].amax(-1).exp().detach()
    return (entropy(log_q) - entropy(log_p) if kind == "entropy-gap" else total_variation(log_q, log_p)).detach()


def kept(scores: Tensor, cut: Tensor | float, side: Side, softness: float | None) -> Tensor:
    """Multipliers `(N,)`: 1 on the named side of `cut`, the cut included, and 0 on the other; or `sigmoid(distance / softness)`."""
    ahead = scores - cut if side == "above" else cut - scores
    return (ahead >= 0).to(scores.dtype) if softness is None else torch.sigmoid(ahead / softness)


def mean_scale(multipliers: Tensor, live: Tensor) -> Tensor:
    """What turns a sum over tokens weighed by `multipliers` `(N,)` into `n` times their mean, n the tokens that are `live`."""
    total = multipliers[live].sum()
    return torch.where(total > 0, live.sum() / torch.where(total > 0, total, 1.0), 0.0)


def quantile_of(values: Tensor, share: float) -> Tensor:
    """The `share` quantile of `(n,)`, linear between neighbours; 0 when there is none."""
    return torch.quantile(values, share) if len(values) else values.new_zeros(())


class SelectedTokens(ObjectiveSettings):
    """A divergence on the tokens above or below a quantile, over the micro-batch, of what is measured of them.

    Ties with the cut are kept. The quantile is that of the tokens with a weight, in one micro-batch of one rank: see the
    module's text. On a top-k signal a teacher's entropy, the gap and the distance are those of its K + 1 outcomes.
    """

    reads: ClassVar[Reads] = "pair"
    type: Literal["selected-tokens"] = "selected-tokens"
    divergence: Inner = ForwardKL()
    """What is summed over the kept tokens."""
    by: Score = "student-entropy"
    """What is measured of each token."""
    keep: Side = "above"
    """On which side of the cut tokens are kept."""
    quantile: Share = 0.5
    """Share of the tokens that lie below the cut."""
    softness: PositiveSchedule | None = None
    """Width of a sigmoid in place of the step, in the unit of the score; None keeps or drops."""
    average: Literal["mask", "kept"] = "mask"
    """Mean over all tokens of the mask, or over the kept ones of each micro-batch, each micro-batch by its own tokens."""

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        return score(self.by, outputs, signal, self.type)[:, None]

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        scores, live = surveyed[:, 0], weights != 0
        cut = quantile_of(scores[live], schedule(self.quantile)(progress))
        softness = None if self.softness is None else schedule(self.softness)(progress)
        multipliers = kept(scores, cut, self.keep, softness)
        if self.average == "kept":
            multipliers = multipliers * mean_scale(multipliers, live)
        return multipliers[:, None]

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        return apply(self.divergence, outputs, signal, weights * numbers[:, 0], progress)


class SelectedTokensAbsolute(ObjectiveSettings):
    """A divergence on the tokens above or below a fixed value of what is measured of them; one pass, whatever the split.

    `by: entropy-gap, threshold: 0, softness: 1` is the direct term of TSD-KD: `sigmoid(H(q) - H(p))`.
    """

    reads: ClassVar[Reads] = "pair"
    type: Literal["selected-tokens-absolute"] = "selected-tokens-absolute"
    divergence: Inner = ForwardKL()
    """What is summed over the kept tokens."""
    by: Score = "entropy-gap"
    """What is measured of each token."""
    keep: Side = "above"
    """On which side of the threshold tokens are kept."""
    threshold: ScheduleConfig = 0.0
    """Where the score is cut, in its unit."""
    softness: PositiveSchedule | None = None
    """Width of a sigmoid in place of the step, in the unit of the score; None keeps or drops."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        scores = score(self.by, outputs, signal, self.type)
        softness = None if self.softness is None else schedule(self.softness)(progress)
        multipliers = kept(scores, schedule(self.threshold)(progress), self.keep, softness)
        return apply(self.divergence, outputs, signal, weights * multipliers, progress)
