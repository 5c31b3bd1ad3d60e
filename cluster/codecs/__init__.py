"""Codecs: a teacher's answers as compact arrays of fixed width, and back. One file per way; `codec_for` chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from cluster.codecs.exact import DenseCodec, ExactCodec
from cluster.codecs.groups import Group, default_groups
from cluster.codecs.hidden import HiddenCodec
from cluster.codecs.sampled import SampledCodec
from cluster.codecs.topk import TopKCodec
from cluster.config import ClusterModel
from cluster.engines import Columns, Request

Arrays = dict[str, NDArray[np.generic]]
"""Named `(N, w)` arrays of a fixed dtype, a row per loss token."""


class Codec(Protocol):
    """Made for one request; holds no state, so that any process made the same way decodes what another encoded."""

    version: ClassVar[int]
    """Rises when the meaning of bytes changes."""

    @property
    def bytes_per_token(self) -> int | None:
        """Of all arrays together; None for hidden states, whose width only the model knows."""

    def encode(self, answers: Columns, tokens: int) -> Arrays:
        """Arrays of N = `tokens` rows from the columns of `Engine.score` but `dropped_mass`; C-contiguous."""

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Columns:
        """The columns of any selection of encoded rows, in their order: the names, dtypes and promises of `Engine.score`."""


class Exact(ClusterModel):
    """Answers as they come: 32 bits a number."""

    type: Literal["exact"] = "exact"


class Packed(ClusterModel):
    """Few bits a number, with errors far below what the answer itself leaves out."""

    type: Literal["packed"] = "packed"
    groups: tuple[Group, ...] | None = None
    """`topk`: ids of falling rank and the bits of their log-probabilities; must add up to `top_k`. Absent: chosen by `top_k`."""
    draw_bits: Annotated[int, Field(ge=1, le=16)] = 8
    """`sampled`: bits of a draw's log-probability."""
    hidden_block: PositiveInt = 64
    """`hidden`: numbers that share a scale."""


CodecConfig = Annotated[Exact | Packed, Field(discriminator="type")]


def codec_for(settings: Exact | Packed, request: Request, vocabulary: int) -> Codec:
    """The codec of `settings` for the answers to `request` about ids below `vocabulary`.

    `ValueError` when `groups` do not fit `top_k`, or `top_k` the vocabulary.
    """
    if request.kind == "topk" and request.top_k > vocabulary:
        raise ValueError(f"top_k: got {request.top_k}; expected at most the {vocabulary} ids that an answer may name")
    if isinstance(settings, Exact) or request.kind == "per-token":
        return ExactCodec(request, vocabulary)
    if request.kind == "topk":
        return TopKCodec(_groups(settings, request.top_k), vocabulary)
    if request.kind == "sampled":
        return SampledCodec(request.draws, request.exponent, settings.draw_bits, vocabulary)
    return HiddenCodec(settings.hidden_block) if request.kind == "hidden" else DenseCodec(vocabulary)


def _groups(settings: Packed, top_k: int) -> tuple[Group, ...]:
    if settings.groups is None:
        return default_groups(top_k)
    held = sum(g.ids for g in settings.groups)
    if held != top_k:
        raise ValueError(f"groups of the packed codec: got {held} ids; expected the {top_k} of top_k, or no groups: they follow from top_k")
    return settings.groups
