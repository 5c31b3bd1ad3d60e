"""Engines that several runs ask: one pool of actors, and runs that take turns at it.

A run's own process is a client that waits. However many requests one run sends, the others' next ones come before its second. The pool's
actors belong to the process that opened it, and end with it however it ends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray

from cluster.config import EndpointConfig
from cluster.endpoints import make_engine
from cluster.engines import Columns, Request, Sampling
from cluster.resources import Share

T = TypeVar("T")


@dataclass(frozen=True)
class Seat:
    """A run's place at a pool."""

    pool: str
    """Name of the pool's desk, an actor."""
    run: str
    """In whose name is asked."""


class Turns(Generic[T]):
    """Whose request is next: runs in turn, each with its oldest."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}

    def put(self, run: str, item: T) -> None:
        self._waiting.setdefault(run, deque()).append(item)

    def take(self) -> T | None:
        """None when nobody waits."""
        run = next(iter(self._waiting), None)
        if run is None:
            return None
        items = self._waiting.pop(run)
        item = items.popleft()
        if items:
            self._waiting[run] = items  # behind everybody who waits now
        return item


class Desk:
    """The actor that runs ask: hands each request to an engine that is idle. What is asked and answered passes by in the object store."""

    def __init__(self, engines: list[Any]) -> None:
        self._idle, self._turns = list(engines), Turns[asyncio.Future[Any]]()

    async def ask(self, run: str, what: str, given: list[Any]) -> list[Any]:
        """Reference of the answer, in a list so that it is not fetched here; its failure is the asker's to see."""
        engine = await self._engine(run)
        try:
            answer = engine.answer.remote(what, *given)
            await asyncio.wait([asyncio.wrap_future(answer.future())])
        finally:
            self._free(engine)
        return [answer]

    async def _engine(self, run: str) -> Any:
        if self._idle:
            return self._idle.pop()
        turn: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._turns.put(run, turn)
        return await turn

    def _free(self, engine: Any) -> None:
        turn = self._turns.take()
        while turn is not None and turn.done():  # whoever waited was cancelled
            turn = self._turns.take()
        if turn is None:
            self._idle.append(engine)
        else:
            turn.set_result(engine)


class PooledEngine:
    """One actor of a pool, with an engine loaded once."""

    def __init__(self, config: EndpointConfig, vocabulary: int, threads: int):
        self._engine = make_engine(config, vocabulary=vocabulary, threads=threads)

    def answer(self, what: str, given: tuple[Columns, Any]) -> Columns:
        """`what` is a method of `cluster.engines.Engine` or `Writer`."""
        answered: Columns = getattr(self._engine, what)(*given)
        return answered


class Shared:
    """A pool as an engine of a run's own."""

    def __init__(self, seat: Seat):
        self._seat, self._desk = seat, ray.get_actor(seat.pool)

    def score(self, columns: Columns, request: Request) -> Columns:
        """See `cluster.engines.Engine.score`."""
        return self._ask("score", columns, request)

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """See `cluster.engines.Writer.write`."""
        return self._ask("write", columns, sampling)

    def _ask(self, what: str, columns: Columns, question: Any) -> Columns:
        (answer,) = ray.get(self._desk.ask.remote(self._seat.run, what, [ray.put((columns, question))]))
        found: Columns = ray.get(answer)
        return found


def open_pool(name: str, config: EndpointConfig, vocabulary: int, share: Share) -> list[Any]:
    """Starts a pool of `config.actors` engines under a name of this Ray session; returns its actors, the desk first."""
    engine = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=-1, max_task_retries=3)(PooledEngine)
    engines = [engine.remote(config, vocabulary, share.threads) for _ in range(config.actors)]
    desk = ray.remote(num_cpus=0, max_concurrency=1000)(Desk).options(name=name).remote(engines)
    return [desk, *engines]


def close_pool(actors: list[Any]) -> None:
    """Ends a pool's actors at once; whoever still asks it fails."""
    for actor in actors:
        ray.kill(actor)
