"""Distances between hidden states of student and teacher, sums over the tokens that are predicted.

The functions are pure and take states `(N, W)` of any float dtype; the settings compute in float32. Teacher states never
carry a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from strategies.core import ObjectiveSettings, Progress, Reads, Settings
from strategies.taps import Filter, Place, Tap, Tapped, Taps


class Matched(Settings):
    """A layer of the student and the layer of the teacher that it learns from."""

    student: Place
    teacher: Place


Layers = Annotated[tuple[Place | Matched, ...], Field(min_length=1)]
"""Layers that are compared; one that stands for both networks, best by depth, or a pair."""


def hidden_mse(mine: Tensor, theirs: Tensor) -> Tensor:
    """`mean_d (mine - theirs)^2` of `(N, W)` states, `(N,)`. CoFi, arXiv:2204.00408 (section 3.2, layer distillation)."""
    return (mine - theirs).square().mean(-1)


def hidden_cosine(mine: Tensor, theirs: Tensor) -> Tensor:
    """`1 - cos(mine, theirs)` of `(N, W)` states, `(N,)`. DistilBERT, arXiv:1910.01108 (section 2).

    Computed as half the squared distance of the directions, which is exactly 0 with gradient 0 where they agree. States
    that are zero have no direction: the value is 1/2 against any other, and 0 against each other.
    """
    return 0.5 * (_unit(mine) - _unit(theirs)).square().sum(-1)


def gram_difference(mine: Tensor, theirs: Tensor) -> Tensor:
    """Mean over the n tokens of one row of `(cos(mine_i, mine_j) - cos(theirs_i, theirs_j))^2`, for each i: `(n,)`.

    Widths may differ. Similarity-preserving distillation, arXiv:1907.09682, between the tokens of a row instead of
    the images of a batch, with cosines as the normalised Gram matrix.
    """
    mine, theirs = _unit(mine), _unit(theirs)
    return (mine @ mine.T - theirs @ theirs.T).square().mean(-1)


def _unit(states: Tensor) -> Tensor:
    norm = states.norm(dim=-1, keepdim=True)
    return states / torch.where(norm > 0, norm, 1.0)


DISTANCES = {"mse": hidden_mse, "cosine": hidden_cosine}


class HiddenStates(ObjectiveSettings):
    """Weighted sum over tokens of the distance between the student's states, mapped to the teacher's width, and the teacher's;
    averaged over the layers.

    With `distance="mse"` `mean_l mean_d (W_l h_q - h_p)^2` (CoFi, arXiv:2204.00408), with `cosine` the third of the three losses
    of DistilBERT (arXiv:1910.01108). Does not choose layers by itself, and does not look at attention.
    """

    reads: ClassVar[Reads] = "states"
    type: Literal["hidden-states"] = "hidden-states"
    layers: Layers = ("output",)
    """What is compared: `output`, `{depth: 0.5}`, `{number: 3}`, or `{student: {number: 2}, teacher: {number: 6}}`."""
    distance: Literal["mse", "cosine"] = "mse"
    filter: Literal["linear", "gelu-linear", "none"] = "linear"
    """Trained map W of each layer from the student's width to the teacher's; `none` asks for equal widths."""

    @property
    def taps(self) -> Taps:
        return hidden_taps(self.layers)

    def filters(self, student: Mapping[Tap, int], teacher: Mapping[Tap, int]) -> dict[str, Filter]:
        """One filter for each layer, by its place in `layers`."""
        pairs = [(student[a], teacher[b]) for a, b in zip(self.taps.student, self.taps.teacher, strict=True)]
        if self.filter != "none":
            return {str(i): Filter(*pair, gelu=self.filter == "gelu-linear") for i, pair in enumerate(pairs)}
        for mine, theirs in pairs:
            if mine != theirs:
                raise ValueError(f"hidden states of width {mine} and {theirs}: expected equal widths, or filter: linear")
        return {}

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        distance, total = DISTANCES[self.distance], weights.new_zeros(())
        for i, (mine, theirs) in enumerate(zip(self.taps.student, self.taps.teacher, strict=True)):
            states = student.tokens(mine)
            mapped = filters[str(i)](states) if filters else states
            total = total + (weights * distance(mapped.float(), teacher.tokens(theirs).detach().float())).sum()
        return total / len(self.layers)


class GramMatrices(ObjectiveSettings):
    """Weighted sum over tokens of `mean_j (R(h_q)_ij - R(h_p)_ij)^2`, R the cosines between the states of a row's predicted
    tokens; averaged over the layers.

    Similarity-preserving distillation (arXiv:1907.09682) inside a row. Trains nothing beside the student; says nothing about a
    row with one predicted token.
    """

    reads: ClassVar[Reads] = "states"
    type: Literal["gram-matrices"] = "gram-matrices"
    layers: Layers = ("output",)

    @property
    def taps(self) -> Taps:
        return hidden_taps(self.layers)

    def filters(self, student: Mapping[Tap, int], teacher: Mapping[Tap, int]) -> dict[str, Filter]:
        return {}

    def compare(self, student: Tapped, teacher: Tapped, filters: Mapping[str, Filter], weights: Tensor, progress: Progress) -> Tensor:
        counts = torch.unique_consecutive(student.token_rows(), return_counts=True)[1].tolist()
        total = weights.new_zeros(())
        with torch.autocast(weights.device.type, enabled=False):
            for mine, theirs in zip(self.taps.student, self.taps.teacher, strict=True):
                rows = zip(student.tokens(mine).float().split(counts), teacher.tokens(theirs).detach().float().split(counts), strict=True)
                differences = [gram_difference(a, b) for a, b in rows]
                total = total + sum((w * d).sum() for w, d in zip(weights.split(counts), differences, strict=True))
        return total / len(self.layers)


def hidden_taps(layers: tuple[Place | Matched, ...]) -> Taps:
    """The hidden states of each pair of layers, in order."""
    pairs = [(p.student, p.teacher) if isinstance(p, Matched) else (p, p) for p in layers]
    return Taps(tuple(Tap("hidden", a) for a, _ in pairs), tuple(Tap("hidden", b) for _, b in pairs))
