"""Codecs: a teacher's answers as compact arrays of fixed width, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cluster.config import ClusterModel
from cluster.engines import Columns, Request

Arrays = dict[str, NDArray[Any]]


class Exact(ClusterModel):
    """Answers as they come: 32 bits a number."""

    type: Literal["exact"] = "exact"


CodecConfig = Annotated[Exact, Field(discriminator=None)]


class Codec(Protocol):
    version: ClassVar[int]

    def encode(self, answers: Columns, tokens: int) -> Arrays: ...
    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> Columns: ...


class ExactCodec:
    version: ClassVar[int] = 1

    def encode(self, answers: Columns, tokens: int) -> Arrays:
        return {n: np.ascontiguousarray(v).reshape(tokens, -1 if tokens else max(1, len(v))) for n, v in answers.items()}

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> Columns:
        return {n: v.ravel() for n, v in arrays.items()}


def codec_for(settings: CodecConfig, request: Request, vocabulary: int) -> Codec:
    return ExactCodec()
