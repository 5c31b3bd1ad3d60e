"""Half an hour of random kills on a cluster of three nodes: run after run, each ends as if nothing had happened to it.

`DISTILL_SOAK_SECONDS` makes it shorter, and `DISTILL_SOAK_SEED` repeats one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.orchestrator.arena import Arena, Run, arena

SECONDS = float(os.environ.get("DISTILL_SOAK_SECONDS", "1800"))
LAST_RUN_SECONDS = 900.0
"""For the run that is under way when the time is over."""
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(SECONDS + LAST_RUN_SECONDS)]
SEED = int(os.environ.get("DISTILL_SOAK_SEED", time.time()))
NODES, STEPS, RESTARTS = 3, 40, 100
PAUSE_SECONDS = (5.0, 40.0)
"""From the end of one kill to the next."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("soak"), NODES, STEPS) as made:
        yield made


def killer(title: str, number: int = signal.SIGKILL) -> Callable[[Arena, Run, random.Random], Run]:
    """Signals any process with this title, if there is one."""

    def strike(home: Arena, run: Run, chance: random.Random) -> Run:
        if found := home.processes(title):
            with_luck = chance.choice(found)
            with contextlib.suppress(psutil.NoSuchProcess):
                with_luck.send_signal(number)
        return run

    return strike


def node(home: Arena, run: Run, chance: random.Random) -> Run:
    """Takes a node that is not the driver's, and brings another."""
    there = [number for number, each in enumerate(home.cluster.nodes) if number and each.found()]
    home.kill_node(chance.choice(there))
    home.mend()
    return run


def driver(home: Arena, run: Run, chance: random.Random) -> Run:
    """Kills it, and goes on with another one once the first one's processes are gone."""
    run.killed()
    home.orphans()
    return run.resumed()


STRIKES = {
    "worker": killer("RayTrainWorker"),
    "scorer": killer("MapWorker"),
    "board": killer("ray::Board"),
    "hangs": killer("RayTrainWorker", signal.SIGSTOP),
    "node": node,
    "driver": driver,
}


def test_random_kills(home: Arena) -> None:
    chance, undisturbed, end = random.Random(SEED), home.undisturbed(), time.monotonic() + SECONDS
    struck: list[str] = []
    runs = 0
    while time.monotonic() < end:
        run = home.start(home.recipe(f"soak-{runs}", seconds=0.5, max_failures=RESTARTS), {"patience": {"worker_seconds": 10.0}})
        run.wait_for_step(1)
        run = disturbed(home, run, chance, struck, end).finish(seconds=600.0)
        assert run.curve == pytest.approx(undisturbed, rel=1e-5), (SEED, struck)
        assert run.status == "FINISHED"
        assert home.orphans() == []
        runs += 1
    print(f"{runs} runs, seed {SEED}: {', '.join(struck)}")
    assert runs and struck


def disturbed(home: Arena, run: Run, chance: random.Random, struck: list[str], end: float) -> Run:
    """The run, struck again and again until it ends or time is up."""
    while time.monotonic() < end:
        pause = time.monotonic() + chance.uniform(*PAUSE_SECONDS)
        while time.monotonic() < pause:
            if run.driver.poll() is not None:
                return run
            time.sleep(0.1)
        if run.folder.joinpath("result.json").exists() or run.driver.poll() is not None:
            return run
        struck.append(chance.choice(sorted(STRIKES)))
        run = STRIKES[struck[-1]](home, run, chance)
    return run
