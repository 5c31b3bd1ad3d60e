"""How long somebody may be silent before it is taken for lost."""

from __future__ import annotations

from pydantic import PositiveFloat

from cluster.settings import ClusterModel


class Patience(ClusterModel):
    """Silences, after which workers are ended and start again from the last checkpoint, as often as `train.max_failures` allows."""

    worker_seconds: PositiveFloat = 120.0
    """Of a training worker's process, which answers Ray even while it computes."""
    rows_seconds: PositiveFloat = 3600.0
    """Of the stream that a training worker waits for, from its start on: with the workers, teachers and writers are started anew. Longer
    than it takes to load a teacher and answer one step."""
