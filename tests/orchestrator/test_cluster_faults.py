"""A run on three nodes, struck in every way: all its rows once, the curve of the undisturbed run, nothing left behind, and a line on
what happened and what was done about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.orchestrator.arena import Arena, Run, arena

pytestmark = pytest.mark.cluster
NODES, STEPS = 3, 14
EVERY = 5
FAULT_STEP = EVERY + 3
"""After the first checkpoint, and some steps before the next."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("faults"), NODES, STEPS) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(home: Arena) -> dict[int, float]:
    return home.undisturbed()


def check(run: Run, undisturbed: dict[int, float], *said: str) -> None:
    """What holds after every fault."""
    assert run.curve == pytest.approx(undisturbed, rel=1e-5)
    assert run.status == "FINISHED"
    for words in said:
        assert words in run.said, run.said[-3000:]
    assert run.arena.orphans() == []


def struck(home: Arena, name: str, strike: Callable[[], object]) -> Run:
    """A run that is struck after some steps and ends well."""
    run = home.start(home.recipe(name))
    run.wait_for_checkpoint(EVERY)
    run.wait_for_step(FAULT_STEP)
    strike()
    return run.finish()


def test_one_run_outlives_its_board_a_worker_and_a_node(home: Arena, undisturbed: dict[int, float]) -> None:
    """Three of the faults below in one run, because starting one takes longest."""
    run = home.start(home.recipe("thrice"))
    run.wait_for_step(2)
    home.processes("ray::Board")[-1].kill()
    run.wait_for_checkpoint(EVERY)
    home.far("RayTrainWorker")[0].kill()
    run.wait_for(lambda: any(r["attempt"] == 2 for r in run.steps), "second attempt")
    home.kill_node(home.far("RayTrainWorker")[1])
    run.finish()
    check(run, undisturbed, "board was lost and has been started anew", "is gone", "Attempt 2 goes on", "Attempt 3 goes on after step 5.")


@pytest.mark.slow
def test_a_killed_worker(home: Arena, undisturbed: dict[int, float]) -> None:
    run = struck(home, "worker", lambda: home.far("RayTrainWorker")[0].kill())
    check(run, undisturbed, "Training worker", "Attempt 2 goes on after step 5.")


@pytest.mark.slow
def test_a_killed_board(home: Arena, undisturbed: dict[int, float]) -> None:
    """Nobody starts again: what the board forgot, it is told again."""
    run = struck(home, "board", lambda: home.processes("ray::Board")[-1].kill())
    check(run, undisturbed, "board was lost and has been started anew")
    assert {r["attempt"] for r in run.steps} == {1}


@pytest.mark.slow
def test_a_killed_node(home: Arena, undisturbed: dict[int, float]) -> None:
    run = struck(home, "node", lambda: home.kill_node(home.far("RayTrainWorker")[1]))
    check(run, undisturbed, "Training worker", "is gone; what ran there is done again", "Attempt 2 goes on after step 5.")


@pytest.mark.slow
def test_a_killed_scorer(home: Arena, undisturbed: dict[int, float]) -> None:
    run = struck(home, "scorer", lambda: home.processes("MapWorker")[-1].kill())
    check(run, undisturbed, "An actor of 'teacher' was lost and has been started anew")


@pytest.mark.slow
def test_a_killed_driver(home: Arena, undisturbed: dict[int, float]) -> None:
    run = home.start(home.recipe("driver"))
    run.wait_for_checkpoint(EVERY)
    run.wait_for_step(FAULT_STEP)
    run.killed()
    assert home.orphans() == []
    assert run.status == "KILLED"
    check(run.resumed().finish(), undisturbed, "Attempt 2 goes on after step 5.")


@pytest.mark.slow
def test_a_worker_that_hangs(home: Arena, undisturbed: dict[int, float]) -> None:
    run = home.start(home.recipe("hangs"), {"patience": {"worker_seconds": 6.0}})
    run.wait_for_checkpoint(EVERY)
    run.wait_for_step(FAULT_STEP)
    home.far("RayTrainWorker")[0].send_signal(signal.SIGSTOP)
    check(run.finish(), undisturbed, "does not answer any more and is taken for dead", "Attempt 2 goes on after step 5.")


@pytest.mark.slow
def test_a_scorer_that_hangs(home: Arena, undisturbed: dict[int, float]) -> None:
    run = home.start(home.recipe("silent"), {"patience": {"rows_seconds": 25.0}})
    run.wait_for_checkpoint(EVERY)
    run.wait_for_step(FAULT_STEP)
    home.processes("MapWorker")[-1].send_signal(signal.SIGSTOP)
    check(run.finish(), undisturbed, "no rows came for 25 seconds", "Attempt 2 goes on after step 5.")


@pytest.mark.slow
def test_a_full_disk_in_a_checkpoint(home: Arena, undisturbed: dict[int, float]) -> None:
    """Real errors of real writes: the kernel lets the workers' files grow no further."""
    run = home.start(home.recipe("full"))
    run.wait_for_checkpoint(EVERY)
    run.wait_for_step(FAULT_STEP)
    for worker in home.processes("RayTrainWorker"):
        worker.rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))
    check(run.finish(), undisturbed, "File too large", "Attempt 2 goes on after step 5.")


@pytest.mark.slow
def test_storage_that_refuses_a_checkpoint(home: Arena, undisturbed: dict[int, float]) -> None:
    run = home.start(home.recipe("refused"))
    run.wait_for_checkpoint(EVERY)
    run.wait_for_step(FAULT_STEP)
    (run.folder / "checkpoint_001_00000010").write_text("in the way")
    check(run.finish(), undisturbed, "Training worker", "failed:", "Attempt 2 goes on after step 5.")


@pytest.mark.slow
def test_a_node_that_is_taken_back(home: Arena, undisturbed: dict[int, float]) -> None:
    """It says so beforehand: a checkpoint is written at once, and less is repeated than lies between two of them."""
    run = home.start(home.recipe("preempted", seconds=2.0, read_ahead_bundles=1))  # telling Ray takes seconds, and so does hearing it
    run.wait_for_step(2)
    drain(home, home.far("RayTrainWorker")[1], seconds=15)
    run.finish()
    check(run, undisturbed, "A node is about to be taken back: a checkpoint is written after step", "Attempt 2 goes on after step")


def drain(home: Arena, number: int, seconds: int) -> None:
    """Tells Ray, as a cloud's agent would, that a node goes in so many seconds."""
    request = urllib.request.Request(f"{home.cluster.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {home.cluster.token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        rows = json.load(answer)["data"]["result"]["result"]
    (node,) = [r["node_id"] for r in rows if r["node_ip"] == f"127.0.0.{number + 2}" and r["state"] == "ALIVE"]
    words = ["drain-node", "--address", home.cluster.address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "taken back", "--deadline-remaining-seconds", str(seconds)]
    environment = {**os.environ, **home.cluster.environment}
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words], env=environment, check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_mlflow_is_gone_for_a_minute(home: Arena, undisturbed: dict[int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.orchestrator.test_track import Server

    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{tmp_path}/server.db")
    server = Server()
    run = home.start(home.recipe("unheard", seconds=2.0), {"mlflow": {"tracking_uri": server.uri}})
    run.wait_for_step(3)
    server.end()
    time.sleep(60)
    server.begin()
    run.finish()
    try:
        check(run, undisturbed, "MLflow does not take metrics", "The run goes on")
    finally:
        server.end()
