"""Self-attention relations: how the tokens of a row resemble each other in the query, key and value vectors of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from strategies.core import ObjectiveSettings, Progress, Reads
from strategies.schedule import ScheduleConfig, schedule
from strategies.taps import Filter, Layer, Part, Tap, Tapped, Taps

PARTS: tuple[Part, ...] = ("query", "key", "value")
NUMBERS_AT_ONCE = 1 << 22
"""Numbers of one relation matrix that exist at one time; more tokens are taken piece by piece and computed again in backward."""


def relations(states: Tensor, places: Tensor, allowed: Tensor, heads: int) -> Tensor:
    """`log softmax(X X^T / sqrt(d))` of n of L places, `(heads, n, L)`; -inf where not `allowed`.

    `states` `(L, W)` are regrouped into relation heads of width d = W / heads; `places` `(n,)` int64; `allowed` `(n, L)` bool,
    true at a place itself.
    """
    grouped = states.unflatten(-1, (heads, -1))
    scores: Tensor = torch.einsum("nad,lad->anl", grouped[places], grouped) * grouped.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def relation_kl(mine: Tensor, theirs: Tensor, places: Tensor, allowed: Tensor, heads: int) -> Tensor:
    """KL(relations of `theirs` || relations of `mine`) of each of n places, averaged over heads: `(n,)`.

    MiniLMv2, arXiv:2012.15828 (section 3.1). Widths may differ; a rotation inside a head changes nothing.
    """
    log_q, log_p = (relations(x, places, allowed, heads) for x in (mine, theirs))
    gap = (log_p - log_q).masked_fill(~allowed, 0.0)  # -inf - -inf, before it is multiplied
    return (log_p.exp() * gap).sum(-1).mean(0)


class Relations(ObjectiveSettings):
    """Weighted sum over tokens of `sum_X weight_X KL(R(X_p) || R(X_q))`, X the queries, keys and values of one layer.

    Multi-head self-attention relations of MiniLMv2 (arXiv:2012.15828), as AutoDistil trains with (arXiv:2201.12507). A token's
    relations reach back over all earlier tokens of its row, prompt included, because a causal network saw no others. Vectors are
    taken before norms and rotary positions. Trains nothing beside the student.
    """

    reads: ClassVar[Reads] = "states"
    type: Literal["relations"] = "relations"
    layer: Layer = Layer(depth=1.0)
    """The student's layer."""
    teacher_layer: Layer | None = None
    """The teacher's; absent: chosen like the student's. For deep teachers an upper middle one may be better than the last."""
    heads: PositiveInt = 16
    """Relation heads; must divide the widths of queries, keys and values of both networks, which may share key heads."""
    query_weight: ScheduleConfig = 1.0
    key_weight: ScheduleConfig = 1.0
    value_weight: ScheduleConfig = 1.0

    @property
    def taps(self) -> Taps:
        theirs = self.teacher_layer or self.layer
        return Taps(tuple(Tap(part, self.layer) for part in PARTS), tuple(Tap(part, theirs) for part in PARTS))

    def filters(self, student: Mapping[Tap, int], teacher: Mapping[Tap, int]) -> dict[str, Filter]:
        widths = [(tap, student[tap]) for tap in self.taps.student] + [(tap, teacher[tap]) for tap in self.taps.teacher]
        for tap, width in widths:
            if width % self.heads:
                raise ValueError(f"{tap}: got width {width}; expected a multiple of the {self.heads} relation heads")
        return {}

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        scales = [schedule(w)(progress) for w in (self.query_weight, self.key_weight, self.value_weight)]
        total = weights.new_zeros(())
        with torch.autocast(weights.device.type, enabled=False):
            for sequence, tokens, places, allowed in self._pieces(student):
                for mine, theirs, scale in zip(self.taps.student, self.taps.teacher, scales, strict=True):
                    x_q, x_p = student.outputs[mine][sequence].float(), teacher.outputs[theirs][sequence].detach().float()
                    kl: Tensor = checkpoint(relation_kl, x_q, x_p, places, allowed, self.heads, use_reentrant=False)
                    total = total + scale * (weights[tokens] * kl).sum()
        return total

    def _pieces(self, tapped: Tapped) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Number of a sequence, which of all tokens, their places in it, and the places that each may look at."""
        length = tapped.rows.shape[1]
        numbers, counts = torch.unique_consecutive(tapped.index // length, return_counts=True)
        most, start = max(1, NUMBERS_AT_ONCE // (self.heads * length)), 0
        for sequence, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            rows = tapped.rows[sequence]
            for first in range(start, start + count, most):
                tokens = slice(first, min(first + most, start + count))
                places = tapped.index[tokens] % length
                earlier = torch.arange(length, device=places.device) <= places[:, None]
                yield sequence, tokens, places, earlier & (rows == rows[places, None])
            start += count
