"""Share of training workers' time that orchestration costs, by weak scaling on a loopback cluster up to 24 workers and 8 scorers.

Workers and scorers are stand-ins that sleep for what a step and a bundle would cost and import no torch, so that two cores can hold
them all; what is around them is the product's own: the order and its reader, Ray Data and Ray Train, the stream's checks, the journal
and the board. A worker's time outside its sleeps is lost: waiting for bundles, or anything else. The slowest worker counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
from ray.data import ActorPoolStrategy, ExecutionOptions
from ray.train import DataConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster import loopback
from cluster.loopback import NodeSize
from orchestrator.board import RankJournal, open_board
from orchestrator.bundle import scalar
from orchestrator.order import Order
from orchestrator.reading import OrderSource, bundles_of
from orchestrator.stream import Part, Stream
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine
from tests.benchmarks.product import ROOT
from tests.prepared import write_split

NAME = "orchestration-share"
SIZES = ((3, 1), (6, 2), (12, 4), (24, 8))
"""Workers and scorers."""
STEP_SECONDS, SCORE_SECONDS = 1.0, 0.25
"""A worker's step, and a scorer's bundle: three workers keep a scorer busy for three quarters of its time."""
STEPS, SKIPPED = 40, 8
"""Steps of a run; those at its beginning that are not timed."""
ROWS_EACH, ROW_TOKENS, ANSWER = 4, 128, 64
"""Rows of a bundle, tokens of a row, and kept ids of a token: what travels is as large as a teacher's top-k."""
NODES = [NodeSize(cpus=16, memory_mib=512)] * 3
AHEAD = 2


class Scorer:
    """Sleeps over each bundle and adds an answer of a real one's size."""

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(SCORE_SECONDS)
        tokens = ROWS_EACH * ROW_TOKENS
        offsets = pa.array([0, tokens * ANSWER], type=pa.int64())
        answer = pa.array(np.zeros(tokens * ANSWER, dtype=np.float32))
        return table.append_column("teacher/logprobs", pa.LargeListArray.from_arrays(offsets, answer))


def train(config: dict[str, Any]) -> None:
    """A worker: takes its bundles, sleeps, and journals as the product's does; leaves its times in a file."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    stream = Stream(ray.train.get_dataset_shard("train"), Part(rank, world, world), AHEAD)
    journal = RankJournal(config["board"], rank, None)
    journal.begin(stream.attempt)
    times: list[tuple[float, float]] = []
    for bundles in stream.after(0, config["steps"]):
        time.sleep(STEP_SECONDS)
        journal.step(stream.attempt, scalar(bundles[0], "step"), dict.fromkeys((f"metric/{i}" for i in range(30)), 1.0))
        times.append((time.time(), stream.waited_seconds))
    Path(config["folder"], f"{rank}.json").write_text(json.dumps(times), encoding="utf-8")


def measure(settings: Settings) -> Figure:
    """Share of the largest size, whose slowest worker counts."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    sizes, steps = (((2, 1),), SKIPPED + 4) if settings.smoke else (SIZES, STEPS)
    cluster = loopback.up(loopback.folder_of(f"benchmark-{os.getpid()}"), NODES[: 1 if settings.smoke else None])
    try:
        os.environ.update(cluster.environment)
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # Ray reads the token's settings once in a process
            found = fresh.submit(_simulated, settings.folder, sizes, steps).result()
    finally:
        loopback.down(cluster)
    return Figure(
        name=NAME,
        value=list(found.values())[-1]["share"],
        unit="share of time",
        against=f"steps of {STEP_SECONDS} s and nothing else; simulated, on loopback",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "steps": steps, "score_seconds": SCORE_SECONDS, "by_size": found},
    )


def _simulated(folder: Path, sizes: Sequence[tuple[int, int]], steps: int) -> dict[str, dict[str, float]]:
    """What each size loses on the cluster that the environment names."""
    ray.init(namespace="distill", log_to_driver=False)
    return {f"{w} workers, {s} scorers": _share(folder / f"{w}-{s}", w, s, steps) for w, s in sizes}


def _share(folder: Path, workers: int, scorers: int, steps: int) -> dict[str, float]:
    """What one size loses, and to what."""
    folder.mkdir(parents=True)
    write_split(folder, "train", np.full(workers * ROWS_EACH * 16, ROW_TOKENS))
    board = open_board(folder.name)
    order = Order(str(folder), 0, steps, workers, batch_rows=workers * ROWS_EACH)

    def stream() -> ray.data.Dataset:
        read = bundles_of(OrderSource(order, 0, 1, False), cpus=0.1, at_once=workers)
        pool = ActorPoolStrategy(size=scorers, max_tasks_in_flight_per_actor=2)
        return read.map_batches(Scorer, batch_size=None, batch_format="pyarrow", compute=pool, num_cpus=1)

    began = time.time()
    DataParallelTrainer(
        train,
        train_loop_config={"board": board, "steps": steps, "folder": str(folder)},
        datasets={"train": stream},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}, placement_strategy="SPREAD"),
        run_config=ray.train.RunConfig(name=folder.name, storage_path=str(folder.parent / "runs")),
    ).fit()
    ray.kill(board)
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[0-9]*.json"))]
    timed = steps - 1 - SKIPPED
    lost = [1 - timed * STEP_SECONDS / (times[-1][0] - times[SKIPPED][0]) for times in ranks]
    waits = [sum(waited for _, waited in times[SKIPPED + 1 :]) / (times[-1][0] - times[SKIPPED][0]) for times in ranks]
    slowest = int(np.argmax(lost))
    parts = {"share": lost[slowest], "waiting for bundles": waits[slowest], "all else": lost[slowest] - waits[slowest]}
    parts |= {"mean share": float(np.mean(lost)), "seconds until the first step": min(t[0][0] for t in ranks) - began}
    print(f"{workers} workers, {scorers} scorers: {parts}", flush=True)
    return parts
