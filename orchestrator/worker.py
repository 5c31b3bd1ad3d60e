"""Entry of a Ray Train worker. Asks for its first bundle before importing what trains: teachers load meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray.train

from cluster.storage import Folder
from orchestrator.config import RunConfig
from orchestrator.stream import Stream


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


def run_worker(config: dict[str, WorkerJob]) -> None:
    """Body of one training worker."""
    job = config["job"]
    context = ray.train.get_context()
    shard = ray.train.get_dataset_shard("train")
    stream = Stream(shard, context.get_world_rank(), context.get_world_size(), job.run.train.read_ahead_bundles)
    from orchestrator.train import train_worker

    train_worker(job, stream)
