"""Real processes killed: a run goes on from its last committed checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestrator.config import load_job
from orchestrator.errors import Refusal
from orchestrator.order import Order
from orchestrator.plan import make_plan
from orchestrator.run import distill, resume
from tests.tiny import source_text, tiny_model, tiny_tokenizer

STEPS, ROWS, EVERY = 18, 8, 5
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student, and lines of very uneven length."""
    folder = tmp_path_factory.mktemp("faults")
    tokenizer = tiny_tokenizer(folder / "model")
    tiny_model(folder / "model", vocab_size=len(tokenizer))
    lines = [line for line in source_text().splitlines() if line.strip()][:300]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def recipe(home: Path, name: str, **train: Any) -> dict[str, Any]:
    """A run whose scorer takes its time, so that a kill lands in the middle."""
    return {
        "name": name,
        "student": str(home / "model"),
        "strategy": {"type": "logits", "top_k": 8},
        "endpoints": {"teacher": {"engine": "fake", "vocabulary": 512, "seconds_per_bundle": 0.15}},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 16, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": ROWS, "lr": 3e-3, "layout": "single", "micro_batch_tokens": 128} | train,
        "checkpoint": {"every_steps": EVERY},
    }


def cluster(home: Path) -> dict[str, Any]:
    return {"storage": str(home / "runs"), "address": "auto"}


def curve(home: Path, name: str) -> dict[int, float]:
    """Loss of each step; asserts that the journal has every step once and that each step had its own rows."""
    rows = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r["values"]]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    job = load_job(home / "runs" / name / "recipe.yaml", cluster=cluster(home))
    order = Order(prepared(home), job.run.seed, STEPS, job.run.train.workers, batch_rows=ROWS)
    assert [r["values"]["row_id_sum"] for r in steps] == [order.step_rows(s).sum() for s in range(1, STEPS + 1)]
    return {r["step"]: r["values"]["loss"] for r in steps}


def prepared(home: Path) -> str:
    (folder,) = (home / "runs" / "data").glob("data-*")
    return str(folder)


def wait_for_step(home: Path, name: str, step: int, seconds: float = 300.0) -> None:
    journal, end = home / "runs" / name / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < end:
        if journal.exists() and f'"step": {step},' in journal.read_text():
            return
        time.sleep(0.05)
    raise TimeoutError(f"{name} did not reach step {step}")


def kill_when(home: Path, name: str, step: int, title: str) -> int:
    """Sends SIGKILL to a Ray process with `title` in its name once the run has reached `step`; returns its pid."""
    wait_for_step(home, name, step)
    mine = psutil.Process().children(recursive=True)  # of this session's Ray, not of another on the machine
    victims = [p for p in mine if title in " ".join(p.cmdline())]
    assert victims, f"no process named {title}"
    newest = max(victims, key=lambda p: p.create_time())  # those of an earlier run may still be ending
    newest.send_signal(signal.SIGKILL)
    return newest.pid


@pytest.fixture(scope="module")
def undisturbed(home: Path, ray_session: str) -> dict[int, float]:
    distill(recipe(home, "undisturbed"), cluster=cluster(home))
    return curve(home, "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("title", ["RayTrainWorker", "MapWorker"])
def test_a_killed_process_changes_nothing(home: Path, undisturbed: dict[int, float], title: str) -> None:
    name = f"killed-{title}"
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_when, home, name, EVERY + 3, title)
        distill(recipe(home, name), cluster=cluster(home))
        assert killed.result()
    assert curve(home, name) == undisturbed


def driver(home: Path, arguments: list[str]) -> subprocess.Popen[str]:
    (home / "cluster.yaml").write_text(yaml.safe_dump(cluster(home)))
    command = [sys.executable, "-m", "jobs.cli", "run", *arguments, "--cluster", str(home / "cluster.yaml")]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ.copy())


def start(home: Path, name: str, **train: Any) -> subprocess.Popen[str]:
    (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe(home, name, **train)))
    return driver(home, [str(home / f"{name}.yaml")])


@pytest.mark.slow
def test_a_killed_driver_is_resumed_and_a_finished_run_is_not(home: Path, undisturbed: dict[int, float]) -> None:
    process = start(home, "driver")
    wait_for_step(home, "driver", EVERY + 4)
    process.kill()
    process.wait()
    resume(home / "runs" / "driver", cluster=cluster(home))
    assert curve(home, "driver") == undisturbed
    with pytest.raises(Refusal, match="finished"):
        make_plan(load_job(recipe(home, "driver"), cluster=cluster(home)), "driver")


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(home: Path, undisturbed: dict[int, float]) -> None:
    process = start(home, "stopped")
    wait_for_step(home, "stopped", EVERY + 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "distill run --resume" in output
    again = driver(home, ["--resume", str(home / "runs" / "stopped")])
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert curve(home, "stopped") == undisturbed


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(home: Path, undisturbed: dict[int, float]) -> None:
    process = start(home, "grown", layout="ddp")
    wait_for_step(home, "grown", EVERY + 2)
    process.kill()
    process.wait()
    resume(home / "runs" / "grown", ["train.workers=2"], cluster=cluster(home))
    assert curve(home, "grown") == pytest.approx(undisturbed, rel=1e-5)
