"""The student's versions: whoever writes step t gets exactly the version that is due, whatever else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.data import ExecutionOptions
from safetensors.torch import save_file

from cluster.config import FakeEndpoint
from cluster.resources import Share
from cluster.storage import Folder
from orchestrator.board import Board, open_board
from orchestrator.bundle import from_table, scalar
from orchestrator.config import load_job
from orchestrator.order import Order
from orchestrator.pipeline import StreamSpec, open_stream
from orchestrator.published import published_weights
from orchestrator.versions import Freshness, Parcel, Publisher, kept_versions
from orchestrator.worker import WorkerJob
from strategies.core import Sampling, ScoreRequest
from strategies.stages.rollout import Rollout
from strategies.stages.score import Score
from tests.prepared import write_split

STEPS = 7


class Whole:
    """A layout with one weight, which training moves."""

    def __init__(self) -> None:
        self.value = 0.0

    def gathered(self, trained: bool = False) -> dict[str, torch.Tensor]:
        return {"model.w": torch.full((2,), self.value), "filters.f": torch.zeros(1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("versions")
    write_split(home, "train", np.random.default_rng(0).integers(4, 30, 50))
    write_split(home, "held_out", np.random.default_rng(1).integers(4, 30, 5))
    return str(home)


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def consume(shard: Any, rank: int, board: Any, staleness: int) -> list[tuple[int, int, list[int]]]:
    """A worker that takes a bundle, and sends out the next version once all have it: step, version, written tokens."""
    publisher = Publisher(board, Whole(), rank, staleness, Parcel())  # type: ignore[arg-type]
    publisher.begin(3, 0, {})
    seen = []
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=max(0, staleness - 1)):
        bundle = from_table(block)
        step = scalar(bundle, "step")
        if step:
            seen.append((step, scalar(bundle, "policy_version"), bundle["tokens"].tolist()))
            publisher.publish(step)
    publisher.end()
    return seen


def run(folder: str, staleness: int, workers: int, writers: int) -> list[list[tuple[int, int, list[int]]]]:
    board = open_board(f"versions-{staleness}-{workers}-{writers}")
    ray.get(board.begin.remote(3, 0, 0.0))
    order = Order(folder, seed=3, steps=STEPS, bundles_per_step=workers, batch_rows=6)
    shares = {"reader": Share(0.1, 0, 1), "teacher": Share(0.1, 0, 1), "student": Share(0.1, 0, 1)}
    endpoints = {
        "teacher": FakeEndpoint(engine="fake", vocabulary=512),
        "student": FakeEndpoint(engine="fake", vocabulary=512, actors=writers),
    }
    stages = (Rollout(Sampling(max_new_tokens=4, temperature=1.0), staleness=staleness), Score("t", "teacher", ScoreRequest("per-token")))
    spec = StreamSpec(order, stages, endpoints, shares, 512, Freshness(staleness, False, board))
    stream = open_stream(spec, start_step=0, attempt=3, with_held_out=True)
    stream.context.execution_options = ExecutionOptions(preserve_order=True)
    shards = stream.streaming_split(workers, equal=True)
    found: list[list[tuple[int, int, list[int]]]] = ray.get([consume.remote(s, r, board, staleness) for r, s in enumerate(shards)])
    ray.kill(board)
    return found


@pytest.fixture(scope="module")
def alone(folder: str, ray_session: str) -> list[tuple[int, int, list[int]]]:
    return run(folder, 0, 1, 1)[0]


@pytest.mark.slow
def test_without_staleness_every_row_is_written_by_the_student_before_its_step(alone: list[tuple[int, int, list[int]]]) -> None:
    assert [(step, version) for step, version, _ in alone] == [(s, s - 1) for s in range(1, STEPS + 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("staleness", "workers", "writers"), [(1, 2, 2), (3, 2, 1)])
def test_staleness_is_exact_for_any_number_of_workers_and_writers(
    folder: str, ray_session: str, alone: list[tuple[int, int, list[int]]], staleness: int, workers: int, writers: int
) -> None:
    ranks = run(folder, staleness, workers, writers)
    for seen in ranks:
        assert [(step, version) for step, version, _ in seen] == [(s, max(0, s - 1 - staleness)) for s in range(1, STEPS + 1)]
    if workers == 2:  # a fake writer's texts do not depend on weights, so the rows of a step are those of any other run
        for (_, _, whole), *parts in zip(alone, *ranks, strict=True):
            assert sorted(whole) == sorted(t for part in parts for t in part[2])


def test_the_due_version_grows_with_the_step_and_never_below_the_beginning() -> None:
    assert [Freshness(2, False, None).due(step) for step in (1, 2, 3, 4, 9)] == [0, 0, 0, 1, 6]


@pytest.mark.parametrize(("staleness", "ahead"), [(None, 4), (0, 0), (1, 0), (2, 1), (9, 4)])
def test_an_iterator_waits_for_no_bundle_that_waits_for_it(staleness: int | None, ahead: int) -> None:
    freshness = None if staleness is None else Freshness(staleness, False, None)
    run = load_job({"student": "s", "strategy": "cross-entropy", "data": "d"}).run
    job = WorkerJob(run=run, steps=9, folder=Folder("r"), held_out=Folder("h"), board=None, threads=1, freshness=freshness)
    assert job.read_ahead_bundles == ahead


@pytest.fixture
def board() -> Iterator[Board]:
    yield Board()


def test_the_board_waits_for_a_version_and_refuses_older_attempts(board: Board) -> None:
    async def scene() -> None:
        board.begin(2, 0, 0.0)
        waiting = asyncio.create_task(board.version(2, 5))
        await asyncio.sleep(0)
        await board.publish(1, {5: ["stale"]})
        await board.publish(2, {4: ["four"]})
        await asyncio.sleep(0)
        assert not waiting.done()
        await board.publish(2, {4: ["four"], 5: ["five"]})
        assert await waiting == (5, ["five"])
        assert await board.version(2, None) == (5, ["five"])
        await board.publish(2, {4: ["four"]})  # a repetition that was under way
        assert await board.version(2, None) == (5, ["five"])
        await board.wait_for_version(2, 3)
        board.begin(3, 4, 0.0)
        with pytest.raises(RuntimeError, match="in charge"):
            await board.wait_for_version(2, 9)

    asyncio.run(scene())


def test_a_board_that_was_restarted_takes_what_is_repeated(board: Board) -> None:
    async def scene() -> None:
        await board.publish(2, {4: ["four"]})
        assert await board.version(2, 4) == (4, ["four"])

    asyncio.run(scene())


def test_older_versions_come_back_from_a_checkpoint(tmp_path: Path, ray_session: str) -> None:
    board, layout = open_board("versions-kept"), Whole()
    ray.get(board.begin.remote(1, 0, 0.0))
    publisher = Publisher(board, layout, 0, 2, Parcel())  # type: ignore[arg-type]
    publisher.begin(1, 0, {})
    for step in (1, 2, 3):
        layout.value = float(step)
        publisher.publish(step)
    publisher.keep(tmp_path)
    publisher.end()
    kept = kept_versions(tmp_path)
    assert {step: sets["student"]["w"].tolist() for step, sets in kept.items()} == {1: [1.0, 1.0], 2: [2.0, 2.0]}
    ray.kill(board)


def test_an_adapters_product_is_merged_under_the_models_own_names() -> None:
    name = "model.base_model.model.layers.0.q_proj"
    a, b, w = torch.randn(2, 4), torch.randn(3, 2), torch.randn(3, 4)

    class Adapted:
        module = torch.nn.Module()

        def gathered(self, trained: bool = False) -> dict[str, torch.Tensor]:
            return {f"{name}.base_layer.weight": w, f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}

    merged = published_weights(Adapted(), 0.5)  # type: ignore[arg-type]
    assert list(merged) == ["layers.0.q_proj.weight"]
    torch.testing.assert_close(merged["layers.0.q_proj.weight"], w + 0.5 * b @ a)


def test_versions_without_names_are_the_students_own(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "version_00000003.safetensors")
    assert {step: {name: list(w) for name, w in sets.items()} for step, sets in kept_versions(tmp_path).items()} == {3: {"student": ["w"]}}
