"""Several teachers in a whole run: a real server process that is killed in its middle, and what becomes of the rows."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from orchestrator.run import distill
from tests.tiny import tiny_pair

STEPS = 12
ROOT = Path(__file__).parents[2]
ONCE = {"max_retries": 0, "timeout_seconds": 5}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pair(tmp_path_factory.mktemp("panel"), rows=120)


def run(
    home: Path, name: str, teachers: list[str], endpoints: dict[str, Any], more: dict[str, Any] | None = None, **strategy: Any
) -> list[dict[str, float]]:
    """Metrics of every step. `more` is of the recipe."""
    recipe = {
        "name": name,
        "student": str(home / "student"),
        "strategy": {"type": "multi-teacher", "teachers": teachers, "take": {"type": "topk", "top_k": 8}, **strategy},
        "endpoints": endpoints,
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 3e-3, "layout": "single", "read_ahead_bundles": 1},
        **(more or {}),
    }
    distill(recipe, cluster={"storage": str(home / "runs"), "address": "auto"})
    lines = [json.loads(line)["values"] for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [values for values in lines if "loss" in values]


class Process:
    """`python -m cluster.engines.fake_server` on a port of its own, which can be killed and started again."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "cluster.engines.fake_server", "--vocabulary", "512", "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ.copy(), stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                httpx2.get(f"{self.url}/models", trust_env=False)
            except httpx2.TransportError:
                time.sleep(0.1)
            else:
                return
        raise TimeoutError("the server did not start")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def killed_at(home: Path, name: str, step: int, again_after: float | None = None) -> Iterator[Process]:
    """A server that is killed once the run `name` has reached `step`, and started again so many seconds later."""
    server, journal = Process(), home / "runs" / name / "metrics.jsonl"
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            if journal.exists() and f'"step": {step},' in journal.read_text():
                server.kill()
                if again_after is not None and not ended.wait(again_after):
                    server.start()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield server
    finally:
        ended.set()
        thread.join()
        server.kill()


def endpoints(home: Path, url: str) -> dict[str, Any]:
    served = {"engine": "openai", "base_url": url, "model": "fake", "vocabulary": 512, "tokenizer": str(home / "teacher"), **ONCE}
    return {"near": {"model": str(home / "teacher")}, "far": served}


@pytest.mark.slow
def test_the_run_goes_on_without_a_teacher_that_died(home: Path, ray_session: str) -> None:
    with killed_at(home, "without", 4) as server:
        steps = run(home, "without", ["near", "far"], endpoints(home, server.url), on_failure="reweight")
    assert len(steps) == STEPS and all(s["rows"] == 8 for s in steps)
    assert steps[0]["unanswered/far"] == 0 and steps[0]["taught_tokens/far"] == pytest.approx(steps[0]["taught_tokens/near"])
    assert steps[-1]["unanswered/far"] == 8 and steps[-1]["taught_tokens/far"] == 0 < steps[-1]["taught_tokens/near"]
    assert all(s["unanswered/near"] == 0 for s in steps)


@pytest.mark.slow
def test_the_run_waits_for_a_teacher_that_comes_back(home: Path, ray_session: str) -> None:
    with killed_at(home, "waited", 4, again_after=5.0) as server:
        waited = run(home, "waited", ["near", "far"], endpoints(home, server.url), on_failure="wait")
        server.start()
        calm = run(home, "calm", ["near", "far"], endpoints(home, server.url), on_failure="wait")
    assert [s["loss"] for s in waited] == pytest.approx([s["loss"] for s in calm], rel=1e-6)
    assert all(s["unanswered/far"] == 0 for s in waited)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [{"take": "dense"}, {"take": "dense", "combine": "product"}, {"gate": {"by": "entropy", "best": True}}],
    ids=["mixture", "product", "best"],
)
def test_two_teachers_with_one_opinion_are_one(home: Path, ray_session: str, strategy: dict[str, Any]) -> None:
    name = f"twins-{'-'.join(strategy)}"
    twins = run(home, name, ["near", "twin"], {n: {"model": str(home / "teacher")} for n in ("near", "twin")}, **strategy)
    take = {name: value for name, value in strategy.items() if name == "take"}
    alone = run(home, f"{name}-alone", ["near"], {"near": {"model": str(home / "teacher")}}, **take)
    assert [s["loss"] for s in twins] == pytest.approx([s["loss"] for s in alone], rel=1e-4)


@pytest.mark.slow
def test_one_teacher_at_a_time_teaches_and_which_is_learnt_from_evaluations(home: Path, ray_session: str) -> None:
    """Off-policy, where what controllers say reaches the rows after a lag."""
    teachers = {"near": {"model": str(home / "teacher")}, "far": {"engine": "fake", "vocabulary": 512}}
    more = {"evaluate": {"every_steps": 1}, "curriculum": {"lag_steps": 1, "mixture": None, "order": {"pace": 1.0}}}
    steps = run(home, "progress", list(teachers), teachers, gate={"by": "progress", "progress": {"explore": 1.0}}, more=more)
    taught = [{name: s[f"taught_tokens/{name}"] > 0 for name in teachers} for s in steps]
    assert all(sum(who.values()) == 1 for who in taught)
    told = [s["control/choice/near"] for s in steps]  # of the step after; rows are two steps behind
    assert [float(who["near"]) for who in taught[2:]] == told[:-2] and {0.0, 1.0} == set(told)


@pytest.mark.slow
def test_a_teacher_that_writes_stands_beside_those_that_score(home: Path, ray_session: str) -> None:
    """Rows are the writer's texts, which the other teacher scores; what it says of them is kept in a store, as of any rows."""
    teachers = {"near": {"model": str(home / "teacher")}, "writer": {"model": str(home / "student")}}
    text = {"type": "seq-kd", "teacher": "writer", "max_new_tokens": 8}
    live = run(home, "texts", ["near"], teachers, text=text)
    kept = run(home, "texts-kept", ["near"], teachers, text=text, more={"signals": {"mode": "store", "codec": "exact"}})
    assert [s["loss"] for s in kept] == pytest.approx([s["loss"] for s in live], rel=1e-5)
    assert all(s["taught_tokens/near"] > 0 and s["loss/ce"] > 0 for s in live)
