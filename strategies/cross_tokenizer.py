"""Distillation from a teacher with another tokenizer, on the dataset's text or on text that the student writes while it learns."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from strategies.aligned import TakeBoundedSpans, TakeForeignTopK, TakeSpans
from strategies.control import AdaptiveShare
from strategies.core import AnyTerm, Player, ScoreRequest, Strategy, Term, lm_update
from strategies.objectives.aligned import AlignedULD, Distance, SharedTokens, SpanLikelihood
from strategies.objectives.likelihood import CrossEntropy
from strategies.on_policy import OnPolicy
from strategies.schedule import ScheduleConfig, Share, schedule
from strategies.sources import Source, Taught
from strategies.stages.align import Align, AlignedTokens, ScoreAligned, Which
from strategies.stages.rollout import RowsOf


class CrossTokenizer(OnPolicy):
    """What is common to strategies whose teacher has another tokenizer: both read the same bytes, each in tokens of its own.

    With the defaults the rows are the data's own; with a `student_share` the student writes that share of them while it learns.
    """

    student_share: ScheduleConfig | AdaptiveShare = 0.0
    """Share of the rows that the student writes; the others keep the data's own completions. A number, a schedule, such as
    `{steps: [[0, 0.0], [500, 1.0]]}` for a warm-up, or `{rise: 0.1}` to grow whenever the held-out loss has risen. Nobody writes
    where it is 0."""
    ce_weight: ScheduleConfig = 1.0
    """Weight of the cross-entropy on the data's own completions."""

    def told(self, take: TakeSpans | TakeBoundedSpans | TakeForeignTopK, *terms: tuple[AnyTerm, Which]) -> Strategy:
        """Terms on what is taken of the teacher's answers, and cross-entropy."""
        return self.aligned(Taught(take, endpoint=self.teacher), take.request, *terms)

    def aligned(self, source: Source, request: ScoreRequest, *terms: tuple[AnyTerm, Which]) -> Strategy:
        """Terms on the teacher's answers about what both have read, each on some tokens of the aligned spans, and cross-entropy."""
        ce = () if self.ce_weight == 0 else (Term("ce", CrossEntropy(), schedule(self.ce_weight)),)
        writing, (watched, base) = self.writing(), self.watched()
        counted = tuple(AlignedTokens(term.name, self.teacher, which) for term, which in terms)
        score = ScoreAligned(self.teacher, self.teacher, request)
        on_given = tuple(RowsOf(term.name, "given") for term in ce if writing)
        return Strategy(
            players={"student": Player()},
            stages=(*writing, Align(self.teacher, of=self.teacher), *counted, score, *watched, *on_given),
            updates=(lm_update(*(term for term, _ in terms), *ce),),
            signals={self.teacher: source},
            controllers=self.controllers(),
            base=base,
        )


class ALM(CrossTokenizer):
    """Match the likelihoods of spans that cover the same bytes, beside cross-entropy.

    Approximate likelihood matching (arXiv:2503.20083). Asks the teacher for nothing but log-probabilities of the given text; with `debias`
    also for how likely a new unit of text is behind every span, which a server does not tell. Compares no hidden states.
    """

    type: Literal["alm"] = "alm"
    distance: Distance = "kl"
    """Between a span's likelihoods, each against its opposite: `kl`, `reverse-kl` or `total-variation`."""
    temperature: PositiveFloat = 100.0
    """Divides the log-probabilities of whole spans before they are compared; 1 compares the likelihoods themselves."""
    debias: bool = False
    """Compares likelihoods of a span and of a unit of text that begins behind it: of all tokens together that start with a space, a tab
    or an end of line, or are special. So a token that ends where a span ends is not taken for a part of a longer one."""
    kd_weight: ScheduleConfig = 1.0
    """Weight of the distance."""

    def build(self) -> Strategy:
        objective = SpanLikelihood(distance=self.distance, temperature=self.temperature)
        take = TakeBoundedSpans() if self.debias else TakeSpans()
        return self.told(take, (Term("kd", objective, schedule(self.kd_weight), signal=self.teacher), "all"))


class ULDStrategy(CrossTokenizer):
    """Match sorted next-token probabilities where both have read the same bytes, beside cross-entropy.

    Universal logit distillation (arXiv:2402.12030), at the first token of every aligned span instead of at equal numbers of tokens. It is
    blind to which token is likely, so the cross-entropy has to say that.
    """

    type: Literal["uld"] = "uld"
    top_k: PositiveInt = 64
    """Teacher tokens kept per position."""
    kd_weight: ScheduleConfig = 1.5
    """Weight of the distance."""

    def build(self) -> Strategy:
        kd = Term("kd", AlignedULD(), schedule(self.kd_weight), signal=self.teacher)
        return self.told(TakeForeignTopK(top_k=self.top_k), (kd, "first"))


class GOLD(CrossTokenizer):
    """A divergence on the tokens that both vocabularies have, sorted probabilities for the others, and likelihoods of longer spans.

    General on-policy logit distillation, after TRL's `GOLDTrainer`: where both have read the same bytes, tokens of the very same bytes are
    compared by `beta`'s divergence and the rest by universal logit distillation. Where a span has several tokens on either side, the
    chain rule merges them, and the merged likelihoods are compared as ALM does (arXiv:2503.20083). Unlike there, shared tokens and the
    rest add up to one on either side, and nothing is renormalised.
    """

    type: Literal["gold"] = "gold"
    top_k: PositiveInt = 64
    """Teacher tokens kept per position."""
    beta: Share = 0.5
    """Weight of the teacher in the mixture that both are compared with, on shared tokens; 0 is forward KL, 1 reverse KL."""
    shared_weight: ScheduleConfig = 1.0
    """Weight of the divergence on shared tokens."""
    unshared_weight: ScheduleConfig = 1.0
    """Weight of the sorted probabilities of the others."""
    spans_weight: ScheduleConfig = 1.0
    """Weight of the likelihoods of spans with several tokens."""
    temperature: PositiveFloat = 100.0
    """Divides the log-probabilities of whole spans before they are compared."""

    def build(self) -> Strategy:
        spans = SpanLikelihood(temperature=self.temperature)
        return self.told(
            TakeForeignTopK(top_k=self.top_k),
            (Term("shared", SharedTokens(beta=self.beta), schedule(self.shared_weight), signal=self.teacher), "first"),
            (Term("unshared", AlignedULD(without_shared=True), schedule(self.unshared_weight), signal=self.teacher), "first"),
            (Term("spans", spans, schedule(self.spans_weight), signal=self.teacher), "several"),
        )
