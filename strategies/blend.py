"""Blend: several teachers made one, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from strategies.core import Reads
from strategies.signals import Dense, Distribution, Hidden, Tail, TopK

if TYPE_CHECKING:
    from strategies.head import TokenLogits

Weight = float | Tensor
"""One number for all tokens, or `(N,)` float32."""


@dataclass(frozen=True)
class Blend(Distribution):
    """One distribution made of K: `mixture` is `sum_k w_k p_k`, `product` is `softmax(sum_k w_k log p_k)`.

    Each p_k is tempered before it is blended. Forward KLs to the members, weighed and added, have the gradient of forward
    KL to their mixture; reverse KLs that to their product (and averaged logits are a product, not a mixture).

    A mixture's weights are shares: not below 0, and divided by their sum. A product's may be anything, such as 2 and -1 to
    extrapolate from the second past the first; a token that a weighed member rules out stays ruled out. `ValueError` when
    the members are not distributions over the same outcomes: all over the whole vocabulary, or all TopK with the same ids
    and tail. Does not route: whoever wants one teacher per token gives weights of 0 and 1.
    """

    members: tuple[Dense | Hidden | TopK, ...]
    weights: tuple[Weight, ...]
    kind: Literal["mixture", "product"] = "mixture"

    def __post_init__(self) -> None:
        kinds = [type(m).__name__ for m in self.members]
        if not self.members or len(self.members) != len(self.weights):
            raise ValueError(f"Blend: got {len(self.members)} members and {len(self.weights)} weights; expected one weight per member")
        if any(not isinstance(m, Dense | Hidden | TopK) for m in self.members):
            raise ValueError(f"Blend: got members {', '.join(kinds)}; expected distributions (Dense, Hidden, or all TopK)")
        numbers = [w for w in self.weights if not isinstance(w, Tensor)]
        if self.kind == "mixture" and (any(w < 0 for w in numbers) or (len(numbers) == len(self.weights) and sum(numbers) <= 0)):
            raise ValueError(f"Blend: got the weights {numbers} of a mixture; expected shares, none below 0 and one above")
        self._check_support(kinds)

    def _check_support(self, kinds: list[str]) -> None:
        kept = [m for m in self.members if isinstance(m, TopK)]
        if kept and len(kept) < len(self.members):
            raise ValueError(f"Blend: got members {', '.join(kinds)}; expected all TopK or none, or their outcomes do not match")
        if any(m.tail != kept[0].tail for m in kept):
            raise ValueError(f"Blend: got the tails {', '.join(m.tail for m in kept)}; expected the same for all members")
        if any(not torch.equal(m.ids, kept[0].ids) for m in kept[1:]):
            raise ValueError(
                "Blend: got TopK members with different ids; expected every teacher scored on the same tokens, or Dense or Hidden"
            )

    @property
    def gives(self) -> frozenset[Reads]:
        return self.members[0].gives

    @property
    def whole(self) -> bool:
        return self.members[0].whole

    @property
    def ids(self) -> Tensor | None:
        """`(N, K)` of members that are top-k: which outcomes are single tokens, and not the bucket of the rest."""
        return self.members[0].ids if isinstance(self.members[0], TopK) else None

    @property
    def tail(self) -> Tail | None:
        """What became of the rest of members that are top-k."""
        return self.members[0].tail if isinstance(self.members[0], TopK) else None

    def chunk(self, start: int, stop: int) -> Blend:
        weights = tuple(w[start:stop] if isinstance(w, Tensor) else w for w in self.weights)
        return Blend(tuple(m.chunk(start, stop) for m in self.members), weights, self.kind)

    def student(self, outputs: TokenLogits, temperature: float) -> Tensor:
        return self.members[0].student(outputs, temperature)

    def teacher(self, vocabulary: int, temperature: float) -> Tensor:
        parts = [m.teacher(vocabulary, temperature) for m in self.members]
        weights = [_column(w, parts[0]) for w in self.weights]
        return _mixture(parts, weights) if self.kind == "mixture" else _product(parts, weights, self._bucket_tokens(vocabulary))

    def _bucket_tokens(self, vocabulary: int) -> int:
        """Tokens that the members' last outcome stands for."""
        return 1 if self.ids is None or self.tail != "bucket" else max(1, vocabulary - self.ids.shape[-1])

    def first(self, outputs: TokenLogits, k: int) -> Tensor:
        first = self.members[0]
        log_p = self.teacher(outputs.logits.shape[-1], 1.0)
        if not isinstance(first, TopK):
            return log_p.topk(min(k, log_p.shape[-1]), -1).indices
        kept = first.ids.shape[-1]  # the bucket is no token
        return first.ids.gather(-1, log_p[:, :kept].topk(min(k, kept), -1).indices)

    def kept_mass(self, outputs: TokenLogits) -> tuple[Tensor, Tensor]:
        first = self.members[0]
        student, teacher = first.kept_mass(outputs)
        if isinstance(first, TopK):
            teacher = self.teacher(outputs.logits.shape[-1], 1.0)[:, : first.ids.shape[-1]].exp().sum(-1)
        return student, teacher


def _column(weight: Weight, like: Tensor) -> Tensor:
    """A weight that multiplies rows: `(N, 1)`, or a scalar tensor."""
    if isinstance(weight, Tensor):
        return weight.detach().to(like.dtype)[:, None]
    return torch.tensor(weight, dtype=like.dtype, device=like.device)


def _mixture(parts: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = torch.stack(torch.broadcast_tensors(*weights)).sum(0).log()
    blended = parts[0] + (weights[0].log() - total)
    for log_p, weight in zip(parts[1:], weights[1:], strict=True):
        blended = torch.logaddexp(blended, log_p + (weight.log() - total))
    return blended


def _product(parts: list[Tensor], weights: list[Tensor], bucket_tokens: int) -> Tensor:
    """Normalised; a last outcome of several tokens is their product summed, as if each member spread its own evenly over them."""
    blended = torch.zeros_like(parts[0])
    for log_p, weight in zip(parts, weights, strict=True):
        ruled_out = torch.where(weight == 0, 0.0, -torch.inf)  # 0 * -inf and -1 * -inf would say something else
        blended += torch.where(torch.isneginf(log_p), ruled_out, weight * log_p)
    if bucket_tokens > 1:
        total = torch.stack(torch.broadcast_tensors(*weights)).sum(0)
        blended[:, -1:] += (1.0 - total) * math.log(bucket_tokens)
    return blended.log_softmax(-1)
