"""TSD-KD: the student's own candidates in the teacher's order, and less doubt. Kim et al., arXiv:2603.13260.

The method is the sum of three terms on text that the student wrote. Its direct term is `selected-tokens-absolute` with `softness` 1
around `jsd` with `beta` 0.9 and `rescale: false`: each token weighs `sigmoid(H(q) - H(p))`, one half where both are equally sure.
Here are the other two, `plackett-luce` (weight 0.1) and `entropy`. Both count by rows and not by micro-batch, so nothing depends on
how a step is split. Two slips of the released code are mended: a ranking's likelihood sums over what is
*not yet* ranked, and openers are counted in each text and not in a flattened batch.

The denominator is the term's mask, not its chosen tokens: a term that chooses a tenth of them has about a tenth of their mean.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenBatch, TokenLogits
from strategies.objectives.base import weighted_sum
from strategies.objectives.parts import token_rows
from strategies.objectives.sampled import reward_to_go
from strategies.objectives.token_weighting import entropy
from strategies.outputs import LOWEST
from strategies.schedule import Share, schedule
from strategies.signals import Signal, given


def plackett_luce(scores: Tensor) -> Tensor:
    """`sum_i (logsumexp over j >= i of s_j) - s_i` of scores `(N, K)`, `(N,)`: minus the log-probability that outcomes are drawn in
    the order in which they stand, each from those left. One that cannot be drawn, of score -inf, must stand last and costs nothing."""
    bounded = scores.clamp_min(LOWEST)
    left = bounded.flip(-1).logcumsumexp(-1).flip(-1)
    return (left - bounded).sum(-1)


def openers(doubts: Tensor, rows: Tensor, share: float) -> Tensor:
    """Which tokens open their row, `(N,)` bool: those before which less than `share` of the row's sum of `doubts` `(N,)` has passed.

    The token with which the share is reached is one of them. Tokens of a row stand in order; rows may interleave. A row without
    any doubt has none.
    """
    to_go = reward_to_go(doubts.double(), rows, 1.0)
    _, row = torch.unique(rows, return_inverse=True)
    return to_go > (1.0 - share) * torch.bincount(row, doubts.double())[row]


def row_quantiles(values: Tensor, rows: Tensor, live: Tensor, share: float) -> Tensor:
    """The `share` quantile of the `live` ones of `values` `(N,)` in each token's row, `(N,)`, linear between neighbours; inf where a
    row has none."""
    _, row = torch.unique(rows, return_inverse=True)
    order = torch.argsort(values.masked_fill(~live, torch.inf))
    ranked = values[order[torch.argsort(row[order], stable=True)]].double()
    sizes, counts = torch.bincount(row), torch.bincount(row, live.double())
    place = share * (counts - 1.0).clamp_min(0.0)
    below, starts = place.long(), sizes.cumsum(0) - sizes
    above = torch.minimum(below + 1, (counts.long() - 1).clamp_min(0))
    cuts = torch.lerp(ranked[starts + below], ranked[starts + above], place - below)
    return torch.where(counts > 0, cuts, torch.inf)[row].to(values.dtype)


class PlackettLuce(ObjectiveSettings):
    """Sum over the openers of each text of the Plackett-Luce loss of the student's likeliest tokens, in the teacher's order.

    TSD-KD's indirect term, arXiv:2603.13260: the teacher only ranks what the student proposes, and tokens that the student does not
    propose are not touched. Openers are the first tokens of a row, up to the one with which `entropy_share` of the row's student
    entropy is reached; tokens of weight 0 have none. Which tokens are proposed carries no gradient; their scores are the student's
    logits. Tokens that the teacher finds equally likely, or rules out, keep the student's order.

    It asks for a signal that knows the whole vocabulary, as those do that give `label` and `pair`: Dense, Hidden and blends of them.
    """

    reads: ClassVar[Reads] = "label"
    type: Literal["plackett-luce"] = "plackett-luce"
    candidates: PositiveInt = 10
    """The student's likeliest tokens that are ranked; 1 teaches nothing."""
    entropy_share: Share = 0.1
    """Share of a text's student entropy that its openers hold."""

    def also_reads(self) -> frozenset[Reads]:
        return frozenset({"pair"})

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        return entropy(outputs.logprobs())[:, None]

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        rows = token_rows(batch.rows, len(weights), weights.device, self.type)
        doubts = torch.where(weights != 0, surveyed[:, 0], 0.0)
        return openers(doubts, rows, schedule(self.entropy_share)(progress)).to(weights.dtype)[:, None]

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        teacher = given(given(signal, self.reads, self.type), "pair", self.type)
        log_q, log_p = teacher.pair(outputs, 1.0)
        ids = self._ranked(log_q.detach(), log_p)
        return weighted_sum(plackett_luce(outputs.picked(ids)), weights * numbers[:, 0])

    def _ranked(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Ids of the student's first tokens in the teacher's order, `(n, K)` int64; what the student rules out comes last."""
        proposed = log_q.topk(min(self.candidates, log_q.shape[-1]), -1)
        likely = log_p.gather(-1, proposed.indices).clamp_min(LOWEST).masked_fill(torch.isneginf(proposed.values), -torch.inf)
        return proposed.indices.gather(-1, likely.sort(stable=True, dim=-1, descending=True).indices)


class Entropy(ObjectiveSettings):
    """Sum of the student's entropy `H(q)`, in nats, over the tokens of each text that are not its surest: it makes it surer.

    TSD-KD's regulariser, arXiv:2603.13260. A text keeps its tokens whose entropy is at least the `quantile` of its own, ties
    included; tokens of weight 0 do not count. A negative weight of the term raises entropy instead.
    """

    reads: ClassVar[Reads] = "nothing"
    type: Literal["entropy"] = "entropy"
    quantile: Share = 0.1
    """Share of a text's tokens, the surest, that are left alone; 0 takes all."""

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        return entropy(outputs.logprobs())[:, None]

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        rows = token_rows(batch.rows, len(weights), weights.device, self.type)
        cuts = row_quantiles(surveyed[:, 0], rows, weights != 0, schedule(self.quantile)(progress))
        return (surveyed[:, 0] >= cuts).to(weights.dtype)[:, None]

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        return weighted_sum(entropy(outputs.logprobs()), weights * numbers[:, 0])
