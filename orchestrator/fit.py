"""One Ray Train run from a plan, in a thread, and the driver's side of the board."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
from ray.data import ExecutionOptions
from ray.exceptions import RayError
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster import session
from orchestrator.alignment import units
from orchestrator.attempt import StreamFactory
from orchestrator.board import Entry, Place, open_board
from orchestrator.errors import origin
from orchestrator.history import smaller_is_better
from orchestrator.mishaps import Nodes, Witness
from orchestrator.plan import Plan
from orchestrator.sealing import sealing_key
from orchestrator.settings import Elastic
from orchestrator.worker import WorkerJob, run_worker

POLL_SECONDS = 0.25
LEAVE_SECONDS = 120.0
"""How long workers that nobody follows have for a last checkpoint."""


@dataclass
class Fit:
    """A training run under way, in a thread of its own so that a person can interrupt the driver."""

    thread: threading.Thread
    board: Any
    error: BaseException | None = None
    place: Place = field(default_factory=Place)
    nodes: Nodes | None = None
    stopping: bool = False

    def entries(self) -> Iterator[list[Entry]]:
        """Journal entries as they come, until the run has ended and all are drained."""
        while True:
            alive = self.thread.is_alive()
            entries, place = ray.get(self.board.drain.remote(self.place))
            yield [*(_note(text) for text in self._seen(place)), *entries]
            if not alive:
                return
            self.thread.join(POLL_SECONDS)

    def _seen(self, place: Place) -> list[str]:
        """What the driver itself notices. A board that was started anew is told again of a wish to stop."""
        seen = self.nodes.changes() if self.nodes else []
        before, self.place = self.place, place
        if before.life in ("", place.life):
            return seen
        if self.stopping:
            self.ask_to_stop()
        return [*seen, "The run's board was lost and has been started anew; it is told again what it held."]

    @property
    def reason(self) -> str:
        """Why the run failed, in the words of the first worker that did."""
        failures = getattr(self.error, "worker_failures", None) or {}
        rank, first = next(iter(sorted(failures.items())), (None, self.error))
        words = "without a word" if first is None else origin(first)
        return f"{'the run' if rank is None else f'training worker {rank}'} failed: {words}."

    def close(self) -> None:
        """The board ends, and its name is free for a resumed run even in this process, where an error may still hold the handle."""
        ray.kill(self.board)

    def ask_to_stop(self) -> None:
        """All ranks write a checkpoint at the same next step, and end."""
        self.stopping = True
        ray.get(self.board.ask_to_stop.remote())

    def leave(self) -> None:
        """Ends a run that nobody follows any more: its workers stop with a checkpoint, or without one when they take too long for it."""
        with contextlib.suppress(RayError):
            self.ask_to_stop()
            self.thread.join(LEAVE_SECONDS)
        with contextlib.suppress(RayError):
            self.close()


@contextlib.contextmanager
def fitting(plan: Plan) -> Iterator[Fit]:
    """Training that goes on inside. An error that ends the block ends it, too: a process that is used again shall not hold its workers."""
    fit = start_fit(plan)
    try:
        yield fit
    except Exception:
        fit.leave()
        raise
    fit.close()


def _note(text: str) -> Entry:
    return Entry("note", 0, 0, {"text": text}, time.time())


def start_fit(plan: Plan) -> Fit:
    """Starts training; returns at once."""
    board = open_board(plan.name)
    workers = plan.shares["worker"]
    freshness = plan.freshness(board)
    job = WorkerJob(
        run=plan.job.run,
        steps=plan.steps,
        folder=plan.folder,
        held_out=plan.held_out,
        board=board,
        threads=workers.threads,
        vocabulary=plan.vocabulary,
        loaded=plan.loaded,
        units=units(plan.strategy),
        freshness=freshness,
        measured=plan.measured,
        domains=plan.data.domains,
        answers=plan.answers,
        key=sealing_key(plan.job.cluster),
        rows_seconds=plan.job.cluster.patience.rows_seconds,
        begins=plan.begins,
    )
    fit = Fit(threading.Thread(target=lambda: None), board, nodes=Nodes())

    def run() -> None:
        try:
            _trainer(plan, job, board, StreamFactory(plan.stream(freshness), plan.folder, plan.held_out, board, plan.begins)).fit()
        except (TrainingFailedError, RayError) as error:  # the latter when Ray Train's controller itself is lost
            fit.error = error

    fit.thread = threading.Thread(target=run, name="fit", daemon=True)
    fit.thread.start()
    return fit


def _trainer(plan: Plan, job: WorkerJob, board: Any, stream: StreamFactory) -> TorchTrainer:
    share, run = plan.shares["worker"], plan.job.run
    elastic = run.train.workers if isinstance(run.train.workers, Elastic) else None
    if elastic:
        session.try_fewer_soon()
    resources: dict[str, float] = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
    environment = {"RAY_ADDRESS": session.address(), "DS_ACCELERATOR": "cuda" if share.gpus else "cpu"}
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        datasets={"train": stream},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
        scaling_config=ScalingConfig(
            num_workers=(run.train.fewest_workers, run.train.most_workers) if elastic else run.train.most_workers,
            elastic_resize_monitor_interval_s=elastic.look_seconds if elastic else 60.0,
            use_gpu=share.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=plan.job.cluster.resources.placement.upper(),
        ),
        run_config=RunConfig(
            name=plan.name,
            storage_path=plan.folder.root.rpartition("/")[0],
            failure_config=FailureConfig(max_failures=run.train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=run.checkpoint.keep,
                checkpoint_score_attribute=run.checkpoint.best_metric if plan.data.held_out.rows else None,
                checkpoint_score_order="min" if smaller_is_better(run.checkpoint.best_metric) else "max",
            ),
            worker_runtime_env={"env_vars": environment},
            callbacks=[Witness(board)],
        ),
    )
