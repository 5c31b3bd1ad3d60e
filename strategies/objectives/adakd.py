"""AdaKD: only the hardest tokens, each at a temperature of its own. Xie et al., arXiv:2510.11615.

Difficulty is the Hellinger distance of teacher and student at temperature 1. Two modules read it: LATF keeps the hardest
share of the tokens, which follows the loss in the strategy `adakd` (`LATFController`) and a schedule elsewhere; IDTS makes
hard tokens cold and easy ones warm.
A falling loss narrows what is kept, so the training value is not comparable between runs: validate on all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeInt
from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads, Settings
from strategies.head import TokenBatch, TokenLogits
from strategies.objectives.divergence import ReverseKL
from strategies.objectives.token_weighting import Inner, apply, single_tokens
from strategies.schedule import PositiveSchedule, ScheduleConfig, Share, schedule
from strategies.signals import Distribution, Signal, Tail, given


class LATF(Settings):
    """When loss-driven token focusing narrows or widens the kept share."""

    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Relative change of the averaged loss that moves the share (epsilon)."""
    step: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Relative change of the share (delta)."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of the loss's moving average, per update."""
    warmup_updates: NonNegativeInt = 100
    """Updates that only average; the next one takes the reference. Not from the paper."""
    smallest: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share below which it never falls."""


@dataclass(frozen=True)
class LATFState:
    """What a checkpoint holds of LATF."""

    share: float = 1.0
    """Kept share of the tokens, the hardest."""
    average: float | None = None
    """Moving average of the loss; None before the first."""
    reference: float | None = None
    """Average at the last change of the share; None during warm-up."""
    updates: int = 0


def latf_update(state: LATFState, loss: float, rule: LATF) -> LATFState:
    """The state after one optimizer step whose global loss was `loss`.

    An average more than `tolerance` below the reference narrows the share by `step`, one as far above widens it; either
    makes the average the new reference.
    """
    average = loss if state.average is None else rule.decay * state.average + (1.0 - rule.decay) * loss
    state = replace(state, average=average, updates=state.updates + 1)
    if state.updates <= rule.warmup_updates:
        return state
    if state.reference is None:
        return replace(state, reference=average)
    if average < state.reference * (1.0 - rule.tolerance):
        return replace(state, share=max(state.share * (1.0 - rule.step), rule.smallest), reference=average)
    if average > state.reference * (1.0 + rule.tolerance):
        return replace(state, share=min(state.share * (1.0 + rule.step), 1.0), reference=average)
    return state


@dataclass(frozen=True)
class LATFController:
    """`latf_update` once per optimizer step, with the loss of `term` over the whole global step: its value is the share kept next."""

    rule: LATF
    term: str

    @property
    def hears(self) -> frozenset[str]:
        return frozenset({f"loss/{self.term}"})

    def begin(self) -> Mapping[str, float]:
        return _numbers(LATFState())

    def after_step(self, state: Mapping[str, float], metrics: Mapping[str, float], progress: Progress) -> Mapping[str, float]:
        known = LATFState(state["share"], state.get("average"), state.get("reference"), int(state["updates"]))
        return _numbers(latf_update(known, metrics[f"loss/{self.term}"], self.rule))

    def after_evaluation(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> Mapping[str, float]:
        return state

    def value(self, state: Mapping[str, float]) -> float:
        return state["share"]


def _numbers(state: LATFState) -> dict[str, float]:
    """What of a state is known, by name."""
    return {name: float(value) for name, value in asdict(state).items() if value is not None}


def hellinger(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`sqrt(sum (sqrt p - sqrt q)^2 / 2)` of log-probabilities `(N, M)`, `(N,)` from 0 to 1. Its gradient at 0 is not finite."""
    return (0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)).sqrt()


def hardest(difficulty: Tensor, live: Tensor, share: float) -> Tensor:
    """Which tokens are kept, `(N,)` bool: the `floor(share n)` hardest of the n that are `live`, and at least one of them."""
    count = int(live.sum())
    kept = torch.zeros_like(live)
    if count:
        ranked = difficulty.masked_fill(~live, -torch.inf)
        kept[ranked.topk(max(1, math.floor(share * count))).indices] = True
    return kept


def idts_temperatures(difficulty: Tensor, centre: Tensor, base: float, strength: float) -> Tensor:
    """`base exp(-strength tanh(log(difficulty / centre)))`, `(N,)`: `base` at the centre, colder where harder, and within
    `base exp(-strength)` and `base exp(strength)`. 0 / 0 counts as 1."""
    above = torch.where(difficulty == centre, 0.0, difficulty.log() - centre.log())
    return base * torch.exp(-strength * torch.tanh(above))


@dataclass(frozen=True)
class TemperedPerToken(Distribution):
    """A signal at a temperature of its own for each token, met by student logits that are tempered already."""

    signal: Signal
    temperatures: Tensor
    """`(N,)` float32."""

    @property
    def gives(self) -> frozenset[Reads]:
        return frozenset({"pair", "expectation"})

    @property
    def ids(self) -> Tensor | None:
        """Which outcomes are single tokens, of a signal of some."""
        return getattr(self.signal, "ids", None)

    @property
    def tail(self) -> Tail | None:
        """What became of the rest, of such a signal."""
        return getattr(self.signal, "tail", None)

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        """(log q, log p) of outputs whose logits are divided by `temperatures`; `ValueError` for one more temperature."""
        if temperature != 1.0:
            raise ValueError(f"a divergence at temperatures per token has no temperature of its own, and got {temperature}")
        log_q, log_p = self.signal.pair(outputs, 1.0)
        by, outcomes = self.temperatures[:, None], log_p.shape[-1]
        tempered, tokens = log_p / by, single_tokens(self.signal, log_p.shape[-1])
        if tokens < outcomes:  # the bucket as a uniform tail, as `TopK` tempers its own
            spread = (1.0 - 1.0 / by) * math.log(outputs.logits.shape[-1] - tokens)
            tempered = torch.cat([tempered[:, :tokens], tempered[:, tokens:] + spread], -1)
        return log_q, tempered.log_softmax(-1)

    def chunk(self, start: int, stop: int) -> TemperedPerToken:
        return TemperedPerToken(self.signal.chunk(start, stop), self.temperatures[start:stop])


def tempered_sum(
    divergence: ObjectiveSettings, outputs: TokenLogits, signal: Signal, weights: Tensor, temperatures: Tensor, progress: Progress
) -> Tensor:
    """Weighted sum of `T_t^2 D(p_T, q_T)` with each token's own T of `temperatures` `(n,)`.

    The signal must be able to be tempered: whole distributions, or top-k with its bucket or renormalised, and not `drop`.
    """
    if getattr(signal, "tail", None) == "drop":
        raise ValueError("a top-k signal whose rest is dropped cannot be tempered per token; give it a bucket, or renormalise")
    warm = TokenLogits(outputs.logits / temperatures[:, None], outputs.labels)
    return apply(divergence, warm, TemperedPerToken(signal, temperatures), weights * temperatures.square(), progress)


def _without_temperature(divergence: ObjectiveSettings) -> ObjectiveSettings:
    if getattr(divergence, "temperature", 1.0) != 1.0:
        raise ValueError("AdaKD gives each token a temperature, and its divergence has one of its own; leave that at 1")
    if divergence.reads == "nothing":
        raise ValueError(f"{divergence.type} reads no teacher, and is not tempered; expected a divergence from one")
    inner = getattr(divergence, "divergence", None)
    if isinstance(inner, ObjectiveSettings):
        _without_temperature(inner)
    return divergence


Untempered = Annotated[Inner, AfterValidator(_without_temperature)]


def tempers(objective: ObjectiveSettings) -> bool:
    """Whether an objective, or one that it wraps, gives each token a temperature of its own."""
    inner = getattr(objective, "divergence", None)
    return isinstance(objective, AdaKD | AdaKDAbsolute) or (isinstance(inner, ObjectiveSettings) and tempers(inner))


def _difficulty(outputs: TokenLogits, signal: Signal) -> Tensor:
    return hellinger(*signal.pair(outputs, 1.0)).detach()


class AdaKD(ObjectiveSettings):
    """Sum whose mean over the mask is `mean over kept tokens of T_t^2 D(p_T, q_T)`, T_t each token's own.

    Which tokens are kept, the median that has temperature `temperature`, and the mean are those of the micro-batch, over
    tokens with a weight: all three depend on how a step is cut into micro-batches. `AdaKDAbsolute` does not. On a top-k signal
    difficulty is that of its K + 1 outcomes.
    """

    reads: ClassVar[Reads] = "pair"
    type: Literal["adakd"] = "adakd"
    divergence: Untempered = ReverseKL()
    """D, at no temperature of its own; the paper's is the reverse KL."""
    keep_share: Share = 1.0
    """Share of the tokens that are kept, the hardest: a number or a schedule; the strategy `adakd` moves it by the loss."""
    temperature: PositiveSchedule = 1.0
    """Tau: of a token of median difficulty."""
    strength: ScheduleConfig = 0.5
    """c: temperatures lie within `tau exp(-c)` and `tau exp(c)`; 0 gives every token tau."""

    def share(self, progress: Progress) -> float:
        """Share kept at a step."""
        return schedule(self.keep_share)(progress)

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        return _difficulty(outputs, given(signal, self.reads, self.type))[:, None]

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        difficulty, live = surveyed[:, 0], weights != 0
        kept = hardest(difficulty, live, self.share(progress))
        centre = difficulty[kept].median() if kept.any() else difficulty.new_ones(())
        temperatures = idts_temperatures(difficulty, centre, schedule(self.temperature)(progress), schedule(self.strength)(progress))
        return torch.stack([kept * live.sum() / kept.sum().clamp_min(1), temperatures], -1)

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        teacher = given(signal, self.reads, self.type)
        return tempered_sum(self.divergence, outputs, teacher, weights * numbers[:, 0], numbers[:, 1], progress)


class FocusedAdaKD(AdaKD):
    """The same with the share of a controller, `LATFController`."""

    control: str
    """Name of the controller."""

    def share(self, progress: Progress) -> float:
        return progress.controls[self.control]


class AdaKDAbsolute(ObjectiveSettings):
    """AdaKD with fixed borders: sum of `T_t^2 D(p_T, q_T)` over tokens at least as hard as `threshold`.

    It adds up over tokens: one pass, whatever the split. Its mean is over the whole mask, not over the kept tokens.
    """

    reads: ClassVar[Reads] = "pair"
    type: Literal["adakd-absolute"] = "adakd-absolute"
    divergence: Untempered = ReverseKL()
    """D, at no temperature of its own; the paper's is the reverse KL."""
    threshold: Share = 0.0
    """Smallest difficulty, a Hellinger distance, that is kept."""
    centre: PositiveSchedule = 0.3
    """Difficulty of a token that has temperature `temperature`. Not from the paper: read it off a run of `adakd`."""
    temperature: PositiveSchedule = 1.0
    """Tau: of a token at `centre`."""
    strength: ScheduleConfig = 0.5
    """c: temperatures lie within `tau exp(-c)` and `tau exp(c)`; 0 gives every token tau."""

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        teacher = given(signal, self.reads, self.type)
        difficulty = _difficulty(outputs, teacher)
        centre = torch.full_like(difficulty, schedule(self.centre)(progress))
        temperatures = idts_temperatures(difficulty, centre, schedule(self.temperature)(progress), schedule(self.strength)(progress))
        kept = difficulty >= schedule(self.threshold)(progress)
        return tempered_sum(self.divergence, outputs, teacher, weights * kept, temperatures, progress)
