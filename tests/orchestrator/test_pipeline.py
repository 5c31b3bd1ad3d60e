"""The stream through real Ray Data: every worker gets its own bundles, in order, whatever the stages' speed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import ray
from ray.data import DataContext, ExecutionOptions

from cluster.config import FakeEndpoint
from cluster.resources import Share
from orchestrator.bundle import from_table, scalar
from orchestrator.order import Order
from orchestrator.pipeline import StreamSpec, open_stream, pools, stage_groups
from strategies.core import Columns, Endpoint, ScoreRequest
from strategies.stages.score import Score
from tests.prepared import write_split

STEPS = 9


class Dawdle:
    """A stage that needs nobody and takes a different time for every bundle."""

    endpoint = None
    needs = frozenset({"tokens"})
    adds = frozenset({"slept"})

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        import time

        seconds = (scalar(columns, "bundle") * 7919 % 5) * 0.02
        time.sleep(seconds)
        return {**columns, "slept": np.asarray([seconds])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("pipeline")
    write_split(home, "train", np.random.default_rng(0).integers(2, 60, 50))
    write_split(home, "held_out", np.random.default_rng(1).integers(2, 60, 5))
    return str(home)


@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_worker_r_gets_bundles_r_modulo_workers_in_order(folder: str, ray_session: str, workers: int) -> None:
    order = Order(folder, seed=3, steps=STEPS, bundles_per_step=workers, batch_rows=6)
    shares = {"reader": Share(0.1, 0, 1), "teacher": Share(0.5, 0, 1)}
    endpoints = {"teacher": FakeEndpoint(engine="fake", vocabulary=512, actors=2)}
    stages = (Score("teacher", "teacher", ScoreRequest("topk", top_k=4)), Dawdle())
    stream = open_stream(StreamSpec(order, stages, endpoints, shares, 512), start_step=0, attempt=4, with_held_out=True)
    stream.context.execution_options = ExecutionOptions(preserve_order=True)
    seen = ray.get([consume.remote(shard) for shard in stream.streaming_split(workers, equal=True)])
    for rank, bundles in enumerate(seen):
        assert [b["bundle"] % workers for b in bundles] == [rank] * len(bundles)
        assert [b["bundle"] for b in bundles] == sorted(b["bundle"] for b in bundles)
        assert all(b["scores"] == 4 * b["loss_tokens"] and b["attempt"] == 4 for b in bundles)
    for step in range(1, STEPS + 1):
        rows = np.concatenate([b["rows"] for bundles in seen for b in bundles if b["step"] == step])
        assert sorted(rows) == sorted(order.step_rows(step))


def test_a_whole_step_may_be_ready_at_once(folder: str, ray_session: str) -> None:
    ahead = "_max_num_blocks_in_streaming_gen_buffer"
    assert hasattr(DataContext(), ahead), "Ray Data does not know this setting of its own any more: who reads has two bundles ready at most"
    order = Order(folder, seed=3, steps=STEPS, bundles_per_step=5, batch_rows=6)
    stream = open_stream(StreamSpec(order, (), {}, {"reader": Share(0.1, 0, 1)}, 512), start_step=0, attempt=1, with_held_out=False)
    assert getattr(stream.context, ahead) == 5


def test_who_manages_a_stream_imports_nothing_that_its_stages_need(folder: str, ray_session: str) -> None:
    shares = {"reader": Share(0.1, 0, 1), "teacher": Share(0.5, 0, 1)}
    endpoints = {"teacher": FakeEndpoint(engine="fake", vocabulary=512)}
    order = Order(folder, seed=3, steps=STEPS, bundles_per_step=1, batch_rows=6)
    stages = (Score("teacher", "teacher", ScoreRequest("topk", top_k=4)),)
    stream = open_stream(StreamSpec(order, stages, endpoints, shares, 512), start_step=0, attempt=1, with_held_out=False)
    plan = ray.cloudpickle.dumps(stream._logical_plan)
    look = "import pickle, sys; pickle.load(sys.stdin.buffer); print([m for m in ('torch', 'strategies') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", look], input=plan, capture_output=True, check=True)
    assert found.stdout.decode().strip() == "[]"


@ray.remote(num_cpus=0.1)
def consume(shard: Any) -> list[dict[str, Any]]:
    found = []
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        columns = from_table(block)
        numbers = {name: scalar(columns, name) for name in ("step", "bundle", "attempt")}
        sizes = {"scores": len(columns["teacher/ids"]), "loss_tokens": int(columns["loss_mask"].sum())}
        found.append({**numbers, **sizes, "rows": columns["row_id"].copy()})
    return found


def test_stages_share_a_process_with_the_endpoint_before_them() -> None:
    first, second, plain = Score("a", "a", ScoreRequest("topk", top_k=4)), Score("b", "b", ScoreRequest("topk", top_k=4)), Dawdle()
    assert stage_groups((plain, first, plain, plain, second)) == [(plain, first, plain, plain), (second,)]
    assert stage_groups((first, plain, first, second)) == [(first, plain, first), (second,)]
    assert stage_groups(()) == []


def test_an_endpoint_has_a_pool_for_every_group_of_its_stages() -> None:
    first, second, plain = Score("a", "a", ScoreRequest("topk", top_k=4)), Score("b", "b", ScoreRequest("topk", top_k=4)), Dawdle()
    assert pools((first, second, plain, first, first)) == {"reader": 1, "a": 2, "b": 1}
    assert pools((plain, first)) == {"reader": 1, "a": 1}
    assert pools((plain,)) == {"reader": 2}


@pytest.mark.cluster
def test_an_actor_without_a_gpu_leaves_those_of_others_alone(ray_session: str) -> None:
    """Ray shows them to it."""

    @ray.remote(num_cpus=0.1)
    def device() -> str:
        import torch

        from cluster.causal_lm import compute_device

        torch.cuda.is_available = lambda: True
        return str(compute_device())

    assert ray.get(device.remote()) == "cpu"
