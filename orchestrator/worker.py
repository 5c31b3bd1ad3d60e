"""Entry of a Ray Train worker. Asks for its first bundle before importing what trains: teachers load meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray.train

from cluster.config import EndpointConfig
from cluster.seal import Key
from cluster.storage import Folder
from orchestrator.config import RunConfig
from orchestrator.stream import Part, Stream
from orchestrator.versions import Freshness

if TYPE_CHECKING:
    from orchestrator.answers import Answers
    from strategies.sources import Taught


@dataclass(frozen=True)
class WorkerJob:
    """What every training worker of a run is told."""

    run: RunConfig
    steps: int
    folder: Folder
    """The run's own folder."""
    held_out: Folder
    """Where scored held-out bundles are kept."""
    board: Any
    threads: int
    vocabulary: int | None = None
    """Token ids, from 0, that student and teachers share."""
    loaded: Mapping[str, EndpointConfig] = field(default_factory=dict)
    """Endpoints whose models workers load, as frozen players or for their output heads."""
    units: tuple[int, ...] = ()
    """The student's ids that begin a unit of text, where a signal is about such."""
    freshness: Freshness | None = None
    """How old the student may be that writes rows, or what decides about them; None where neither is so."""
    measured: Mapping[str, Taught] = field(default_factory=dict)
    """Signals that held-out rows carry, a control's too."""
    domains: tuple[str, ...] = ()
    """Domains of the rows, whose losses are told apart."""
    begins: Folder | None = None
    """Checkpoint of another run that this one goes on from; None where it begins by itself."""
    answers: Answers | None = None
    """How the student answers held-out prompts; None where it does not."""
    key: Key | None = None
    """Seals checkpoints."""
    rows_seconds: float | None = None
    """Longest wait for rows before the stream is taken for lost; None waits for ever."""

    @property
    def read_ahead_bundles(self) -> int:
        """Ray's iterator gives a bundle once it has so many later ones. Where the student writes, those wait for earlier steps: with as
        many as `staleness` nothing would be written while it trains, and with more nothing would ever come."""
        ahead = self.run.train.read_ahead_bundles
        return ahead if self.freshness is None else min(ahead, max(0, self.freshness.staleness - 1))


def run_worker(config: dict[str, WorkerJob]) -> None:
    """Body of one training worker."""
    job = config["job"]
    context = ray.train.get_context()
    shard = ray.train.get_dataset_shard("train")
    part = Part(context.get_world_rank(), context.get_world_size(), job.run.train.most_workers)
    stream = Stream(shard, part, job.read_ahead_bundles, job.rows_seconds)
    from orchestrator.train import train_worker

    train_worker(job, stream)
