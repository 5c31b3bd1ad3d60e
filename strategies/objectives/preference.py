"""Preferences between two whole sequences: DPO, SimPO and REDI, as sums over pairs.

**Pairs.** Rows `2i` and `2i + 1` of a micro-batch (`TokenBatch.rows`) are the chosen and the rejected text of one prompt.
Both must lie in the same micro-batch, each with at least one loss token.

**Weights.** A pair weighs what the *one* non-zero weight among its chosen row's tokens says, and the rejected row has
none: `pair_weights` makes that column. A term's denominator is its count of non-zero weights, so it is the number of
pairs, and the train step's division gives the mean over pairs. A pair without any weight is left out. Every loss token
of a row belongs to its sequence, whatever the weights say: mask a shared prefix with the loss mask.

The objectives need two passes: the first adds up each row's log-probability, the second hands every token its share of
the gradient, which is exact. The value of a pair stands on the token that carries its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.head import TokenBatch, TokenLogits
from strategies.objectives.parts import advantage, surrogate, teacher_label_logprobs, token_rows
from strategies.schedule import PositiveSchedule, ScheduleConfig, Share, schedule
from strategies.signals import Signal

CHOSEN, REJECTED = 0, 1


def pair_weights(tokens_of_row: NDArray[np.int64]) -> NDArray[np.float32]:
    """The weight column of a preference term, `(N,)`: 1 on the first loss token of each chosen row, 0 elsewhere.

    `tokens_of_row` `(2P,)`: loss tokens of each row, chosen and rejected in turn, none of them 0.
    """
    if len(tokens_of_row) % 2 or (tokens_of_row < 1).any():
        raise ValueError(f"expected rows in pairs, each with loss tokens, and got rows of {tokens_of_row.tolist()} tokens")
    weights = np.zeros(int(tokens_of_row.sum()), dtype=np.float32)
    weights[(np.cumsum(tokens_of_row) - tokens_of_row)[::2]] = 1.0
    return weights


@dataclass(frozen=True)
class Pairs:
    """The P pairs of a micro-batch of N tokens."""

    place: Tensor
    """`(N,)` int64: twice the pair's number, plus 1 on a rejected row."""
    lengths: Tensor
    """`(P, 2)` float64 loss tokens of the chosen and the rejected row."""
    weights: Tensor
    """`(P,)` float64."""

    @classmethod
    def of(cls, batch: TokenBatch, weights: Tensor, reader: str) -> Pairs:
        """The pairs of `batch`; `ValueError` for a row without partner and for weights that do not follow the convention."""
        rows = token_rows(batch.rows, len(weights), weights.device, reader)
        numbers, pair = torch.unique(rows // 2, return_inverse=True)
        place = 2 * pair + rows % 2
        lengths = torch.bincount(place, minlength=2 * len(numbers)).view(-1, 2)
        weighed = torch.bincount(place, (weights != 0).double(), minlength=2 * len(numbers)).view(-1, 2)
        _check(numbers, lengths, weighed, reader)
        total = torch.bincount(place, weights.double(), minlength=2 * len(numbers)).view(-1, 2)
        return cls(place, lengths.double(), total[:, CHOSEN])

    def sums(self, values: Tensor) -> Tensor:
        """Sums of `values` `(N,)` over the tokens of each row, `(P, 2)` float64."""
        return torch.bincount(self.place, values.double(), minlength=2 * len(self.weights)).view(-1, 2)

    def numbers(self, losses: Tensor, slopes: Tensor, weights: Tensor) -> Tensor:
        """`(N, 2)` float32 of each token: the weighed loss `(P,)` of its pair where it carries the weight, and the weighed
        slope `(P, 2)` of the loss in its row's log-probability."""
        value = losses[self.place // 2].float() * weights
        slope = (self.weights[:, None] * slopes).view(-1)[self.place]
        return torch.stack([torch.where(weights != 0, value, 0.0), slope.float()], -1)


def _check(numbers: Tensor, lengths: Tensor, weighed: Tensor, reader: str) -> None:
    if (lengths == 0).any():
        pair, side = (lengths == 0).nonzero()[0].tolist()
        lone, missing = 2 * int(numbers[pair]) + 1 - side, 2 * int(numbers[pair]) + side
        raise ValueError(f"{reader} compares rows 2i and 2i + 1: row {lone} has loss tokens here, and its partner {missing} has none")
    astray = (weighed[:, CHOSEN] > 1) | (weighed[:, REJECTED] > 0)
    if astray.any():
        pair = int(astray.nonzero()[0])
        raise ValueError(
            f"{reader} weighs pairs: rows {2 * int(numbers[pair])} and {2 * int(numbers[pair]) + 1} have "
            f"{int(weighed[pair, CHOSEN])} and {int(weighed[pair, REJECTED])} non-zero weights; expected one on the chosen "
            "row and none on the rejected one, as `pair_weights` makes them"
        )


def _second_pass(outputs: TokenLogits, numbers: Tensor) -> Tensor:
    return surrogate(numbers[:, 0], numbers[:, 1], outputs.label_logprobs())


def _no_survey(outputs: TokenLogits) -> Tensor:
    """`(n, 0)`: nothing is asked of single tokens."""
    return torch.zeros((len(outputs.labels), 0), device=outputs.labels.device)


class DPO(ObjectiveSettings):
    """Direct preference optimisation: sum over pairs of `-log sigmoid(beta (m_chosen - m_rejected))`.

    m = log q(y) - log ref(y) over the whole sequence. Rafailov et al., arXiv:2305.18290, eq. 7. The signal carries the
    reference's log-probabilities of the given tokens: the student's own start (SODA) or a large teacher, whose offset
    wants `length_normalised`. At q = ref it is log 2 per pair. Likelihood of *both* sides may fall while it does.
    """

    reads: ClassVar[Reads] = "label"
    pairs: ClassVar[bool] = True
    type: Literal["dpo"] = "dpo"
    beta: PositiveSchedule = 0.1
    """Inverse temperature of the preference, per nat."""
    length_normalised: bool = False
    """Whether each side's m is divided by its loss tokens."""

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        return -advantage(teacher_label_logprobs(signal, outputs, self.type), outputs.label_logprobs())[:, None]

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        pairs = Pairs.of(batch, weights, self.type)
        per = 1.0 / pairs.lengths if self.length_normalised else torch.ones_like(pairs.lengths)
        losses, slopes = preference_loss(per * pairs.sums(surveyed[:, 0]), schedule(self.beta)(progress))
        return pairs.numbers(losses, per * slopes, weights)

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        return _second_pass(outputs, numbers)


class SimPO(ObjectiveSettings):
    """Preference without a reference: sum over pairs of `-log sigmoid(beta (r_chosen - r_rejected) - gamma)`.

    r = log q(y) / |y|, the mean log-probability of a loss token. Meng et al., arXiv:2405.14734, eq. 6.
    """

    reads: ClassVar[Reads] = "nothing"
    pairs: ClassVar[bool] = True
    type: Literal["simpo"] = "simpo"
    beta: PositiveSchedule = 2.0
    """Scale of the mean log-probabilities, per nat."""
    gamma: ScheduleConfig = 1.0
    """Target margin, in units of the scaled difference."""

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        return outputs.label_logprobs()[:, None]

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        pairs = Pairs.of(batch, weights, self.type)
        means = pairs.sums(surveyed[:, 0]) / pairs.lengths
        losses, slopes = preference_loss(means, schedule(self.beta)(progress), schedule(self.gamma)(progress))
        return pairs.numbers(losses, slopes / pairs.lengths, weights)

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        return _second_pass(outputs, numbers)


class REDI(ObjectiveSettings):
    """Learn from right and wrong traces: sum over pairs of `-log q(chosen) / |chosen| + alpha log q(rejected) / |rejected|`.

    Xu et al., arXiv:2505.24850, eq. 5; its second stage, after SFT on right traces. No reference, no saturation: it has
    no lower bound for alpha > 0, and at alpha near 1 and a high rate both likelihoods collapse, so stop when that of the
    chosen text falls. Linear in log q, hence no more than lengths is asked of the first pass.
    """

    reads: ClassVar[Reads] = "nothing"
    pairs: ClassVar[bool] = True
    type: Literal["redi"] = "redi"
    alpha: Share = 0.8
    """Weight of the rejected text; 0 is length-normalised SFT on the chosen one."""

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        return _no_survey(outputs)

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        pairs = Pairs.of(batch, weights, self.type)
        signs = torch.tensor([-1.0, schedule(self.alpha)(progress)], dtype=torch.float64, device=weights.device)
        return pairs.numbers(torch.zeros_like(pairs.weights), signs / pairs.lengths, weights)[:, 1:]

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        slopes = numbers[:, 0]
        return (slopes * torch.where(slopes != 0, outputs.label_logprobs(), 0.0)).sum()


def preference_loss(scores: Tensor, beta: float, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """`-log sigmoid(beta (s_chosen - s_rejected) - margin)` of scores `(P, 2)`: its value `(P,)` and its slope in each, `(P, 2)`."""
    ahead = beta * (scores[:, CHOSEN] - scores[:, REJECTED]) - margin
    pull = beta * torch.sigmoid(-ahead)
    return softplus(-ahead), torch.stack([-pull, pull], -1)
