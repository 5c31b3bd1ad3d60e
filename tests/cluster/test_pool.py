"""One pool of engines for several runs: whose turn it is, and answers that are those of an engine of one's own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from cluster.config import FakeEndpoint
from cluster.engines.fake import FakeEngine
from cluster.pool import Desk, Seat, Shared, Turns, close_pool, open_pool
from cluster.resources import Share

NAME = "find/teacher"
TOPK = SimpleNamespace(kind="topk", top_k=4, draws=0, exponent=1.0)
COLUMNS: dict[str, Any] = {
    "tokens": np.arange(6, dtype=np.int32),
    "lengths": np.asarray([6], dtype=np.int32),
    "loss_mask": np.asarray([0, 1, 1, 1, 1, 1], dtype=np.uint8),
    "row_id": np.zeros(1, dtype=np.int64),
    "step": np.ones(1, dtype=np.int64),
}


def test_runs_take_turns_however_much_each_of_them_asks() -> None:
    turns = Turns[int]()
    for run, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)]:
        turns.put(run, item)
    assert [turns.take() for _ in range(3)] == [1, 4, 5]
    turns.put("c", 7)
    assert [turns.take() for _ in range(5)] == [2, 6, 7, 3, None]


def test_an_engine_serves_one_request_at_a_time_and_a_failure_frees_it() -> None:
    log: list[str] = []
    answers: list[Future[str]] = []

    def answer(what: str, given: str) -> SimpleNamespace:
        """An engine's actor, whose answers come when they are told to."""
        log.append(given)
        answers.append(Future())
        return SimpleNamespace(future=lambda: answers[len(log) - 1])

    async def session() -> None:
        desk = Desk([SimpleNamespace(answer=SimpleNamespace(remote=answer))])
        asked = [asyncio.ensure_future(desk.ask(run, "score", [given])) for run, given in [("a", "a1"), ("a", "a2"), ("b", "b1")]]
        for turn in range(3):
            while len(answers) <= turn:
                await asyncio.sleep(0)
            assert len(answers) == turn + 1
            if turn:
                answers[turn].set_result("answer")
            else:
                answers[turn].set_exception(ValueError("malformed"))
        await asyncio.gather(*asked)

    asyncio.run(session())
    assert log == ["a1", "a2", "b1"]


@pytest.fixture
def pool(ray_session: str) -> Iterator[list[Any]]:
    actors = open_pool(NAME, FakeEndpoint(engine="fake", vocabulary=50), 32, Share(cpus=0.1, gpus=0.0, threads=1))
    yield actors
    close_pool(actors)


def test_a_pool_answers_as_an_engine_of_ones_own_and_its_errors_reach_who_asked(pool: list[Any]) -> None:
    shared, own = Shared(Seat(NAME, "one")), FakeEngine(32)
    found, wanted = shared.score(COLUMNS, TOPK), own.score(COLUMNS, TOPK)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="top_k: got 33"):
        Shared(Seat(NAME, "two")).score(COLUMNS, SimpleNamespace(kind="topk", top_k=33, draws=0, exponent=1.0))
    ray.kill(pool[1], no_restart=False)  # an engine that dies is started again
    assert shared.score(COLUMNS, TOPK).keys() == wanted.keys()
