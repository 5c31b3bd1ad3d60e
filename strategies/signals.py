"""Signals: what teaches, typed. Every signal meets the student through one method, `pair`.

`pair` returns aligned natural log-probabilities (log q, log p), both `(N, M)` float32, so that no objective asks which
signal it got. Teacher tensors never carry a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from strategies.head import Head, TokenLogits

Tail = Literal["bucket", "renormalise", "drop"]
TAIL_FLOOR = 1e-9
"""Smallest teacher mass given to the bucket, so that the reverse direction stays finite."""


class Signal(Protocol):
    """A teacher's view of N tokens."""

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        """Aligned (log q, log p), each `(N, M)` float32, both tempered by `temperature`."""
        ...

    def chunk(self, start: int, stop: int) -> Signal:
        """The same signal for tokens `start:stop`."""
        ...


@runtime_checkable
class Costly(Protocol):
    """A signal whose numbers are made by a matrix product, which wants more tokens at once than objectives see."""

    def ready(self) -> Signal:
        """The same signal with that product made, for a block of tokens whose pieces are taken afterwards."""
        ...


@dataclass(frozen=True)
class TopK:
    """The teacher's K most likely tokens at temperature 1, and what becomes of the rest.

    `tail` names the treatment: `bucket` adds one outcome holding all other tokens on both sides, tempered as a uniform
    tail (strategies book C7, C8); `renormalise` restricts both sides to the K tokens; `drop` is the bucket without its
    last outcome: the K tokens at their own mass (not a divergence, may be negative).
    """

    ids: Tensor
    """`(N, K)` int64, sorted by falling teacher probability."""
    logprobs: Tensor
    """`(N, K)` float32 natural log-probabilities at temperature 1."""
    tail: Tail = "bucket"

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor], name: str, tail: Tail = "bucket") -> TopK:
        """Read the column group `name` as moved to the device: `name/ids`, `name/logprobs`."""
        return cls(columns[f"{name}/ids"], columns[f"{name}/logprobs"], tail)

    def chunk(self, start: int, stop: int) -> TopK:
        return TopK(self.ids[start:stop], self.logprobs[start:stop], self.tail)

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        vocabulary, kept = outputs.logits.shape[-1], self.ids.shape[-1]
        log_p = self.logprobs.float() / temperature
        log_q, log_q_tail = outputs.partition(self.ids, temperature, want_tail=self.tail == "bucket" and kept < vocabulary)
        if self.tail == "renormalise":
            return log_q.log_softmax(-1), log_p.log_softmax(-1)
        if kept < vocabulary:
            log_p = torch.cat([log_p, self._tempered_tail(vocabulary, temperature)], dim=-1)
        log_p = log_p.log_softmax(-1)
        if log_q_tail is None:
            return log_q, log_p[:, :kept]
        return torch.cat([log_q, log_q_tail], dim=-1), log_p

    def _tempered_tail(self, vocabulary: int, temperature: float) -> Tensor:
        """Unnormalised log weight of the bucket: `(V-K)^(1-1/T) r^(1/T)`, exact for a uniform tail. `(N, 1)`."""
        tail = (1.0 - self.logprobs.double().exp().sum(-1, keepdim=True)).clamp_min(TAIL_FLOOR)
        spread = (1.0 - 1.0 / temperature) * math.log(vocabulary - self.ids.shape[-1])
        return (tail.log() / temperature + spread).float()


@dataclass(frozen=True)
class Hidden:
    """A teacher's last hidden states and its output head, `(V, D)` over the student's vocabulary: its whole distribution."""

    hidden: Tensor
    """`(N, D)` in the teacher's compute dtype."""
    head: Head
    made: Tensor | None = None
    """`(N, V)` raw logits in the same dtype, for a block of tokens."""

    def chunk(self, start: int, stop: int) -> Hidden:
        return Hidden(self.hidden[start:stop], self.head, None if self.made is None else self.made[start:stop])

    def ready(self) -> Hidden:
        return Hidden(self.hidden, self.head, self.head.block(self.hidden))

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = self.head.logits(self.hidden, self.made)
            log_p = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
        return outputs.logprobs(temperature), log_p
