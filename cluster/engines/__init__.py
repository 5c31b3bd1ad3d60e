"""Engines: what answers for an endpoint inside a stage's own process. One file each; `cluster.endpoints` chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Columns = dict[str, NDArray[np.generic]]
"""One bundle, or a part of it: named flat arrays. `tokens` (S,) int32, `lengths` (R,) int32, `loss_mask` (S,) uint8."""


Kind = Literal["topk", "dense", "sampled", "hidden", "per-token", "among"]


class Request(Protocol):
    """What is asked of every loss token."""

    @property
    def kind(self) -> Kind: ...
    @property
    def top_k(self) -> int:
        """`topk`: ids kept."""

    @property
    def draws(self) -> int:
        """`sampled`: ids drawn, with replacement."""

    @property
    def exponent(self) -> float:
        """`sampled`: they are drawn from the probabilities to this power."""


class Engine(Protocol):
    """A model that puts numbers on the tokens of one bundle at a time, never mixing two."""

    def score(self, columns: Columns, request: Request) -> Columns:
        """Numbers for the N = loss_mask.sum() loss tokens, in flat order, each given the prefix of its row; U ids are usable.

        Always `dropped_mass` (1,) float32: the largest probability that fell outside the usable ids before renormalisation.
        `cost` (1,) float32, the price of this answer, from an engine whose tokens have one.
        Of every kind but `hidden`, `logprob` (N,) float32 of the token itself (-inf for one that is not usable). Besides, in
        natural logarithms at temperature 1:
        `topk`: `ids` (N*K,) int32 sorted by falling probability, `logprobs` (N*K,) float32;
        `dense`: `dense` (N*U,) float32, log-probabilities of the usable ids;
        `sampled`: `ids` (N*n,) int32, `logprobs` (N*n,) float32, `weights` (N*n,) float32 that make averages over the draws
        unbiased; a function of seed, row, step and place, whatever bundle the row is in;
        `hidden`: `hidden` (N*D,) float32, or bfloat16 seen as int16: what the output head reads;
        `among`: `among` (N,) float32, that of all those ids together which the bundle's column `wanted` (B,) int32 names.
        `ValueError` when `top_k` exceeds U or the bundle is malformed.
        """
        ...


class Sampling(Protocol):
    """How texts are written."""

    @property
    def samples(self) -> int:
        """Texts for each prompt."""

    @property
    def temperature(self) -> float:
        """0 writes the likeliest token each time."""

    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int:
        """0 draws from all ids."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end a text and are its last token."""


@runtime_checkable
class Writer(Protocol):
    """An engine that also writes."""

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """Texts that follow each row's `tokens`, n = samples of them for every row: rows in order, then samples.

        `columns` may carry `max_new_tokens` (R,) int32, at least 1: a row's own limit, and the smaller of it and the sampling's counts.
        `tokens` (S,) int32 of the written texts alone, `lengths` (R*n,) int32, `row_id` (R*n,) int64, `sample` (R*n,) int32 from 0,
        `finished` (R*n,) uint8: 1 for a text that ended with one of `stop`, 0 for one that met its limit; `logprobs` (S,)
        float32 of the written tokens at temperature 1 among the usable ids, NaN where an engine is not told. Only usable ids are
        written. `cost` (1,) float32 as in `Engine.score`. A text is a function of the prompt, the seed, the row's id and the
        sample, up to the rounding that the shape of a batch brings.
        """
        ...


@runtime_checkable
class Follower(Protocol):
    """An engine whose weights move with a student."""

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replaces the weights of the engine's model in place by floating-point `weights`, cast to the model's dtype, and remembers
        `version`; whatever is asked from then on is answered by them.

        Names are those of `model.state_dict()`; of names for one tied tensor, all but one may be absent. `ValueError` naming up to
        three when names are missing or unexpected or shapes differ, and then no weight has changed.
        """
        ...
