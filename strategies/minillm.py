"""MiniLLM: the reverse KL of whole texts, split into what a token does itself and what it does to all that follow."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from strategies.core import Player, Strategy, Term, lm_update
from strategies.objectives.divergence import ForwardKL, ReverseKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.sampled import ReverseKLRewardToGo
from strategies.on_policy import OnPolicy
from strategies.policy import ACTED
from strategies.schedule import PositiveSchedule, ScheduleConfig, Share, schedule
from strategies.sources import TakeDense, TakenActions, TakeTopK, Taught
from strategies.stages.rollout import RowsOf
from strategies.stages.score import Score


class MiniLLM(OnPolicy):
    """The reverse KL of the texts that the student writes, and an ordinary loss on the data's own.

    MiniLLM (arXiv:2306.08543, section 2.2 and algorithm 1). On written rows two terms, whose gradients add up to that of the KL of
    whole texts: `single`, each token's reverse KL in closed form, and `long`, a policy gradient by what the tokens after it earn,
    log p - log q each, discounted and divided by how many they are. With `discount` 1, without `length_normalised`, uncut and with
    `take: {type: dense}` the sum is exact; on top-k tokens `single` counts all others as one. On given rows cross-entropy and forward
    KL, which stand for the paper's loss on a plain corpus, by half each.

    One step is taken on each text, so there is no clipped ratio and q_old; a text of staler weights is corrected by
    `importance_cap`, each token by its own ratio. Rewards are cut and never whitened, unlike in the released
    code. Does not mix the teacher into the sampling: the student writes alone (the paper's alpha is 0), at temperature 1 from all tokens.
    """

    type: Literal["minillm"] = "minillm"
    student_share: ScheduleConfig = 0.5
    """Share of the rows that the student writes; the others keep the data's own completions."""
    take: Annotated[TakeTopK | TakeDense, Field(discriminator="type")] = TakeTopK()
    """What is asked of the teacher, beside the log-probability of every token."""
    single_weight: ScheduleConfig = 1.0
    """Weight of the reverse KL of each token."""
    long_weight: ScheduleConfig = 1.0
    """Weight of what follows."""
    discount: Share = 0.95
    """What a reward one token later is worth, as in the released code; 1 in the paper."""
    length_normalised: bool = True
    """Whether what follows is divided by its number of tokens, so that early tokens do not outweigh late ones."""
    clip_reward: PositiveSchedule | None = 50.0
    """Largest |log p - log q| that is earned, in nats: 100 of the released code, which doubles it."""
    importance_cap: PositiveFloat | None = 2.0
    """Largest weight q / q_writer of a token that staler weights wrote; None: no such weights."""
    given_ce_weight: ScheduleConfig = 0.5
    """Weight of the cross-entropy on given rows."""
    given_kl_weight: ScheduleConfig = 0.5
    """Weight of the forward KL on given rows."""

    @model_validator(mode="after")
    def _unbiased(self) -> MiniLLM:
        if (self.sample_temperature, self.top_p, self.sample_top_k) != (1.0, 1.0, 0):
            raise ValueError("expected sample_temperature 1, top_p 1 and sample_top_k 0: rewards hold for text drawn from all tokens")
        return self

    def build(self) -> Strategy:
        written, given = self._on_written(), self._on_given()
        rows = (*(RowsOf(t.name, "written") for t in written), *(RowsOf(t.name, "given") for t in given))
        scores, base = self.watched(Score(self.teacher, self.teacher, self.take.request))
        return Strategy(
            players={"student": Player()},
            stages=(*self.writing(always=True), *scores, *rows),
            updates=(lm_update(*written, *given),),
            signals={self.teacher: Taught(self.take, endpoint=self.teacher), ACTED: TakenActions(teacher=self.teacher)},
            controllers=self.controllers(),
            base=base,
        )

    def _on_written(self) -> tuple[Term, ...]:
        long = ReverseKLRewardToGo(
            clip=self.clip_reward,
            discount=self.discount,
            later_only=True,
            length_normalised=self.length_normalised,
            importance_cap=self.importance_cap,
        )
        single = Term("single", ReverseKL(), schedule(self.single_weight), signal=self.teacher)
        return single, Term("long", long, schedule(self.long_weight), signal=ACTED)

    def _on_given(self) -> tuple[Term, ...]:
        """Without those that weigh nothing."""
        ce = () if self.given_ce_weight == 0 else (Term("ce", CrossEntropy(), schedule(self.given_ce_weight)),)
        kl = () if self.given_kl_weight == 0 else (Term("kl", ForwardKL(), schedule(self.given_kl_weight), signal=self.teacher),)
        return *ce, *kl
