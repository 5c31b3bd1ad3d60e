"""An engine that reads what a teacher said before: no model, no forward."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from cluster.codecs import Codec, CodecConfig, codec_for
from cluster.config import StoreEndpoint
from cluster.engines import Columns, Request
from cluster.storage import Folder
from cluster.stores.files import StoreFiles
from cluster.stores.key import StoreKey
from cluster.stores.reader import StoreReader

_CODEC: TypeAdapter[CodecConfig] = TypeAdapter(CodecConfig)


class StoreEngine:
    """Answers from finished stores, one for each question that may be asked. Rows are known by `row_id`."""

    def __init__(self, config: StoreEndpoint):
        """`StoreDamaged` for a folder that holds no readable store."""
        self._stores: dict[str, tuple[StoreReader, Codec]] = {}
        for root in config.folders:
            reader = StoreReader(StoreFiles(Folder.of(root), Path(config.cache)))
            key = reader.files.spec.key
            self._stores[_question(key.request)] = (reader, codec_of(key))

    def score(self, columns: Columns, request: Request) -> Columns:
        """See `cluster.engines.Engine.score`. `ValueError` for a question that no store answers."""
        found = self._stores.get(_question(question(request)))
        if found is None:
            raise ValueError(f"request {question(request)}: got stores of {', '.join(self._stores)}; expected one of that question")
        reader, codec = found
        arrays, dropped = reader.read(columns)
        return {**codec.decode(arrays), "dropped_mass": np.asarray([dropped], dtype=np.float32)}


def question(request: Request) -> dict[str, Any]:
    """What a store's key says of a request."""
    assert dataclasses.is_dataclass(request) and not isinstance(request, type)
    return dataclasses.asdict(request)


def codec_of(key: StoreKey) -> Codec:
    """The codec of a store, for the vocabulary it was filled with."""
    return codec_for(_CODEC.validate_python(key.codec), Asked(**key.request), key.vocabulary)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as a store's key tells it."""

    kind: Any
    top_k: int = 0
    draws: int = 0
    exponent: float = 1.0


def _question(request: dict[str, Any]) -> str:
    return str(sorted(request.items()))
