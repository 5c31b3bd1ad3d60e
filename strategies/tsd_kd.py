"""TSD-KD: the teacher teaches most where the student doubts, ranks what the student proposes, and the student becomes surer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from strategies.core import Player, Strategy, Term, lm_update
from strategies.objectives.mixtures import JSD
from strategies.objectives.token_weighting import SelectedTokensAbsolute
from strategies.objectives.tsd_kd import Entropy, PlackettLuce
from strategies.on_policy import OnPolicy
from strategies.schedule import ScheduleConfig, Share, schedule
from strategies.sources import TakeDense, TakeHidden, Taught
from strategies.stages.score import Score


class TokenSelectiveDualKD(OnPolicy):
    """Token-selective dual distillation on the student's own text (arXiv:2603.13260): three terms, each on tokens of its choice.

    `direct`: the unrescaled Jensen-Shannon divergence, each token weighed by sigmoid(H(q) - H(p)). `indirect`: the Plackett-Luce loss
    of the student's `candidates` likeliest tokens in the teacher's order, on the first tokens of each text, until they hold
    `opener_share` of its entropy. `entropy`: the student's own entropy on all but the surest `entropy_quantile` of each text's tokens.

    Unlike in the released code, a ranking sums over what is not yet ranked, and openers and quantiles belong to one text. Each term
    is divided by all its tokens and not by the chosen ones. Rows that the student did not write count as those that it did. Asks for
    the teacher's whole distribution, which a server behind a URL does not give.

    The weights are for a student that knows much already. The unrescaled divergence pulls with b(1-b) = 0.09 of a KL's
    strength, so that `entropy` at weight 1 makes a student that knows little sure of anything: give it 0.01 then, or leave it out.
    """

    type: Literal["token-selective-dual-kd"] = "token-selective-dual-kd"
    take: Annotated[TakeHidden | TakeDense, Field(discriminator="type")] = TakeHidden()
    """What is asked of the teacher."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Weight of the teacher in the mixture that both are compared with; at 0 and 1 the unrescaled divergence would jump to a KL."""
    candidates: PositiveInt = 10
    """Tokens that the student proposes and the teacher ranks."""
    opener_share: Share = 0.1
    """Share of a text's student entropy that its ranked first tokens hold."""
    entropy_quantile: Share = 0.1
    """Share of a text's tokens, the surest, whose entropy is left alone."""
    direct_weight: ScheduleConfig = 1.0
    """Weight of the divergence."""
    indirect_weight: ScheduleConfig = 0.1
    """Weight of the ranking."""
    entropy_weight: ScheduleConfig = 1.0
    """Weight of the entropy, which falls; a negative one raises it."""

    def build(self) -> Strategy:
        direct = SelectedTokensAbsolute(divergence=JSD(beta=self.beta, rescale=False), softness=1.0)
        indirect = PlackettLuce(candidates=self.candidates, entropy_share=self.opener_share)
        terms = (
            Term("direct", direct, schedule(self.direct_weight), signal=self.teacher),
            Term("indirect", indirect, schedule(self.indirect_weight), signal=self.teacher),
            Term("entropy", Entropy(quantile=self.entropy_quantile), schedule(self.entropy_weight)),
        )
        weights = (self.direct_weight, self.indirect_weight, self.entropy_weight)
        scores, base = self.watched(Score(self.teacher, self.teacher, self.take.request))
        return Strategy(
            players={"student": Player()},
            stages=(*self.writing(), *scores),
            updates=(lm_update(*(term for term, weight in zip(terms, weights, strict=True) if weight != 0)),),
            signals={self.teacher: Taught(self.take, endpoint=self.teacher)},
            controllers=self.controllers(),
            base=base,
        )
