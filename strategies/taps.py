"""Taps: which inner outputs of a network an objective reads, what was read, and the filters trained between two networks.

Shape letters: B sequences of L places each, N of all places predict loss tokens, W width of what is tapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from strategies.core import Progress, Settings
from strategies.head import Head


class Layer(Settings):
    """One decoder layer, by `number` or by `depth`; exactly one of the two. What is read is the layer's output."""

    number: int | None = None
    """1 is the first layer, -1 the last; 0 is what the first layer reads, the embeddings."""
    depth: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of all layers: 1.0 is the last, 0.5 the one half-way, halves rounded up."""

    @model_validator(mode="after")
    def _one(self) -> Layer:
        if (self.number is None) == (self.depth is None):
            raise ValueError("expected either number or depth, such as {number: 3} or {depth: 0.5}")
        return self

    def of(self, layers: int) -> int:
        """The number in a network of so many layers, 0 to `layers`. `ValueError` when it has no such layer."""
        if self.depth is not None:
            return max(1, int(self.depth * layers + 0.5))
        assert self.number is not None
        found = self.number if self.number >= 0 else layers + 1 + self.number
        if not 0 <= found <= layers or (self.number < 0 and found == 0):
            raise ValueError(f"layer number {self.number}: got a network of {layers} layers; expected one it has")
        return found


Place = Layer | Literal["output"]
"""A layer, or `output`: what the output head reads, after the network's last norm."""
Part = Literal["hidden", "query", "key", "value"]


@dataclass(frozen=True)
class Tap:
    """One inner output, `(B, L, W)`. Query, key and value are those of a layer's attention as its projections give them:
    all heads side by side, before norms and rotary positions."""

    part: Part
    place: Place

    def __str__(self) -> str:
        place = self.place
        if isinstance(place, str):
            return f"{self.part} of the output"
        return f"{self.part} of layer {place.number}" if place.depth is None else f"{self.part} at depth {place.depth:g}"


OUTPUT = Tap("hidden", "output")
"""The states that the output head reads."""


@dataclass(frozen=True)
class Taps:
    """What an objective reads of two networks."""

    student: tuple[Tap, ...]
    teacher: tuple[Tap, ...]


@dataclass(frozen=True)
class Tapped:
    """What one network gave for one micro-batch."""

    outputs: Mapping[Tap, Tensor]
    """`(B, L, W)` by tap."""
    index: Tensor
    """`(N,)` int64 places in the flattened `(B*L)` that predict the loss tokens."""
    rows: Tensor
    """`(B, L)` int64: the number of the row at each place. No row has tokens in two sequences; padding may have any number, but
    never stands left of a token of its row."""
    labels: Tensor | None = None
    """`(N,)` int64 the loss tokens."""
    head: Head | None = None
    """The network's own output head, a frozen one's over the usable ids."""
    reads: Tensor | None = None
    """`(N,)` int64 the tokens that stand at those places."""
    embed: Callable[[Tensor], Tensor] | None = None
    """Input embeddings `(n, W)` of ids `(n,)`, without a gradient; a student's only inside its forward."""

    def tokens(self, tap: Tap) -> Tensor:
        """`(N, W)` at the places that predict the loss tokens."""
        return self.outputs[tap].flatten(0, 1).index_select(0, self.index)

    def token_rows(self) -> Tensor:
        """`(N,)` the row of each of them."""
        return self.rows.flatten().index_select(0, self.index)

    def apart(self) -> Tapped:
        """The same numbers as tensors of their own, through which gradients pass on to the network."""
        return replace(self, outputs={tap: values.view_as(values) for tap, values in self.outputs.items()})


class Filter(nn.Module):
    """`W h`, or `W gelu(h)`: a trained map from one width to another, without a bias.

    A linear one that keeps the width starts as the identity, so that equal networks start at distance zero; any other is
    drawn from torch's generator with variance 1 / width.
    """

    def __init__(self, width: int, into: int, gelu: bool = False):
        super().__init__()
        self.width, self.into, self.gelu = width, into, gelu
        weight = torch.eye(width) if width == into and not gelu else torch.randn(into, width) * width**-0.5
        self.weight = nn.Parameter(weight)

    @property
    def shape(self) -> tuple[int, int, bool]:
        """What makes two filters alike but for their weights."""
        return self.width, self.into, self.gelu

    def forward(self, states: Tensor) -> Tensor:
        """`(..., into)` of `(..., width)`, in the dtype of the weights unless autocast says otherwise."""
        states = states.to(self.weight.dtype)
        return nn.functional.linear(nn.functional.gelu(states) if self.gelu else states, self.weight)


class StatesObjective(Protocol):
    """A pure function of inner states of student and teacher: a **sum** over weighted tokens, never a mean."""

    @property
    def taps(self) -> Taps: ...

    def filters(self, student: Mapping[Tap, int], teacher: Mapping[Tap, int]) -> dict[str, Filter]:
        """The modules it trains beside the student, by a name of its own, for networks whose taps have these widths; always the
        same names and shapes. `ValueError` for widths that it cannot compare."""
        ...

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        """The sum over N tokens with `weights` `(N,)` float32; a scalar. No gradient reaches `teacher`."""
        ...
