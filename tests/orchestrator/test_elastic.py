"""Groups of workers that grow and shrink: the same bundles whoever takes them, and on a real cluster the same curve."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster import loopback
from orchestrator.bundle import HELD_OUT_STEP, scalar
from orchestrator.errors import Refusal
from orchestrator.order import Order
from orchestrator.plan import make_plan
from orchestrator.reading import read_bundles
from orchestrator.settings import Elastic
from orchestrator.stream import Part, Stream
from tests.orchestrator.arena import SIZE, Arena, arena
from tests.orchestrator.bench import Bench
from tests.prepared import write_split

BUNDLES, STEPS, ROWS = 4, 5, 12


class Shard:
    """What one of `world` workers gets of a stream: Ray Data deals blocks in turn, and drops those that not everybody gets."""

    def __init__(self, blocks: list[pa.Table], rank: int, world: int):
        self._own = blocks[: len(blocks) // world * world][rank::world]

    def iter_batches(self, **settings: Any) -> Iterator[pa.Table]:
        return iter(self._own)


@pytest.fixture
def order(tmp_path: Path) -> Order:
    for split, rows in (("train", 60), ("held_out", 5)):
        write_split(tmp_path, split, np.random.default_rng(0).integers(2, 40, rows))
    return Order(str(tmp_path), 3, STEPS, BUNDLES, batch_rows=ROWS, elastic=True)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("held_out", [False, True])
def test_any_number_of_workers_takes_every_bundle_of_every_step(order: Order, world: int, start: int, held_out: bool) -> None:
    blocks = list(read_bundles(order, start, 1, held_out))
    taken: dict[int, list[int]] = {}
    for rank in range(world):
        stream = Stream(Shard(blocks, rank, world), Part(rank, world, BUNDLES), 0)
        for bundles in stream.after(start, STEPS):
            rows = [int(row) for bundle in bundles for row in bundle["row_id"]]
            taken.setdefault(scalar(bundles[0], "step"), []).extend(rows)
            assert len(bundles) in (BUNDLES // world, -(-BUNDLES // world))
            for _, bundle in stream.held_out():
                assert scalar(bundle, "step") == HELD_OUT_STEP
    assert {step: sorted(rows) for step, rows in taken.items()} == {s: sorted(order.step_rows(s)) for s in range(start + 1, STEPS + 1)}


def test_a_fixed_group_gets_nothing_after_the_last_step(order: Order) -> None:
    fixed = Order(order.folder, 3, STEPS, BUNDLES, batch_rows=ROWS)
    assert len(list(read_bundles(fixed, 0, 1, False))) == STEPS * BUNDLES
    assert len(list(read_bundles(order, 0, 1, False))) == STEPS * BUNDLES + BUNDLES - 1


def test_a_step_ends_without_waiting_for_the_next(order: Order) -> None:
    """Its bundles may wait for what this one makes."""
    blocks = list(read_bundles(order, 0, 1, False))[:BUNDLES]

    class Silent(Shard):
        def iter_batches(self, **settings: Any) -> Iterator[pa.Table]:
            yield from self._own
            Future[None]().result(timeout=5)

    stream = Stream(Silent(blocks, 0, 1), Part(0, 1, BUNDLES), 0)
    assert len(next(stream.after(0, STEPS))) == BUNDLES


def test_the_plan_takes_a_range_where_the_layout_can(bench: Bench) -> None:
    plan = make_plan(bench.job("train.layout=ddp", "train.workers={min: 1, max: 4}"), "recipe")
    assert (plan.order.bundles_per_step, plan.order.elastic) == (4, True)
    assert plan.job.run.train.workers == Elastic(min=1, max=4)
    with pytest.raises(Refusal, match=r"train.workers: got a changing number with the layout 'deepspeed'.*ddp or fsdp2"):
        make_plan(bench.job("train.layout=deepspeed", "train.workers={min: 1, max: 4}"), "recipe")
    with pytest.raises(Refusal, match="at most `max`"):
        bench.job("train.workers={min: 3, max: 2}")


# On a cluster


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """A cluster of one node, which holds one worker and a teacher."""
    with arena(tmp_path_factory.mktemp("elastic"), nodes=1, steps=60, cpus=1.2) as made:
        yield made


def workers(run: Any) -> list[int]:
    """How many workers took each step that is kept."""
    return [int(r["values"]["workers"]) for r in run.steps]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_group_grows_with_a_node_and_shrinks_without_it(lonely: Arena, layout: str) -> None:
    changing = {"min": 1, "max": 2, "look_seconds": 3.0}
    run = lonely.start(lonely.recipe(layout, seconds=0.5, layout=layout, workers=changing))
    run.wait_for_step(3)
    lonely.cluster = loopback.join(lonely.cluster, SIZE)
    run.wait_for(lambda: bool(run.steps) and run.steps[-1]["values"]["workers"] == 2, "second worker")
    here = run.steps[-1]["step"]
    run.wait_for_step(min(60, here + lonely.every + 2))
    lonely.kill_node(len(lonely.cluster.nodes) - 1)
    run.finish()
    assert run.curve == pytest.approx(lonely.undisturbed(), rel=1e-5)
    assert workers(run)[0] == 1 and 2 in workers(run) and workers(run)[-1] == 1
    assert "2 of at most 2 workers train" in run.said and "1 of at most 2 workers train" in run.said
    assert run.status == "FINISHED"
    assert lonely.orphans() == []
