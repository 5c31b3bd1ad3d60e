"""Stages under way to their actors, as bytes that only those take apart.

Imports neither torch nor a strategy: Ray Data's managers of a stream read its plan in processes of their own, and would otherwise import
all that the stages need before the first bundle moves.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
from ray import cloudpickle

Handler = Callable[[pa.Table], pa.Table]


def packed(make: Callable[[], Handler]) -> bytes:
    """What `StageActor` is made of; `make` is called where it lives."""
    content: bytes = cloudpickle.dumps(make)
    return content


class StageActor:
    """What Ray Data calls for every bundle, inside one actor of a pool."""

    def __init__(self, content: bytes):
        self._handle: Handler = cloudpickle.loads(content)()

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._handle(table)
