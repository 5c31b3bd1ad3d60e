"""A loopback cluster on which runs are disturbed: what the tests of faults, of elastic groups and the soak share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from cluster import loopback
from cluster.loopback import Loopback, NodeSize
from cluster.storage import Folder
from orchestrator.bundle import from_table
from orchestrator.config import load_job
from orchestrator.delivery import connect
from orchestrator.journal import RunRecord
from orchestrator.order import Order
from orchestrator.pipeline import StageGroup
from orchestrator.plan import make_plan
from orchestrator.players import load_players
from orchestrator.reading import read_bundles
from orchestrator.remembering import newest_commit
from orchestrator.teachers import Teachers
from orchestrator.train import Networks, train_step
from orchestrator.wishes import Wish
from strategies.core import Progress
from tests.tiny import source_text, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
SIZE = NodeSize(2)
TITLES = ("RayTrainWorker", "MapWorker", "Board", "TrainController", "SplitCoordinator", "DatasetManager", "_FetchFn")
"""Processes of a run, as Ray calls them. What is left of a cluster between runs has other names."""
PATIENCE_SECONDS = 300.0


@contextmanager
def arena(folder: Path, nodes: int, steps: int, cpus: float = 1.0) -> Iterator[Arena]:
    """A cluster of so many nodes, of two CPUs each, that ends with the block; its runs take `steps` steps."""
    tokenizer = tiny_tokenizer(folder / "model")
    tiny_model(folder / "model", vocab_size=len(tokenizer))
    lines = [line for line in source_text().splitlines() if line.strip()][:300]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        patch.setenv("RAY_health_check_period_ms", "1000")  # a lost node is noticed within seconds
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        made = Arena(folder, loopback.up(loopback.folder_of(f"arena-{os.getpid()}"), [SIZE] * nodes), nodes, steps, cpus)
        try:
            yield made
        finally:
            loopback.down(made.cluster)


@dataclass
class Arena:
    """A cluster, and the folder of its runs."""

    home: Path
    cluster: Loopback
    nodes: int
    steps: int
    cpus: float
    rows: int = 8
    every: int = 5
    """Steps from one checkpoint to the next."""

    def recipe(self, name: str, seconds: float = 0.15, **train: Any) -> dict[str, Any]:
        """A run whose scorer takes its time over every bundle, so that a fault lands in the middle."""
        return {
            "name": name,
            "student": str(self.home / "model"),
            "strategy": {"type": "logits", "top_k": 8},
            "endpoints": {"teacher": {"engine": "fake", "vocabulary": 512, "seconds_per_bundle": seconds}},
            "data": {"train": str(self.home / "rows.jsonl"), "held_out_rows": 16, "max_length_tokens": 48},
            "train": {"steps": self.steps, "batch_rows": self.rows, "lr": 3e-3, "layout": "ddp", "workers": 2, "micro_batch_tokens": 128}
            | train,
            "checkpoint": {"every_steps": self.every},
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Workers on nodes of their own, with room beside each for a teacher."""
        worker = {"cpus": self.cpus, "threads": 1}
        return {"storage": str(self.home / "runs"), "resources": {"worker": worker, "placement": "spread"}}

    def undisturbed(self) -> dict[int, float]:
        """Loss of each step, by one worker's train step in this process: no Ray, nothing that could be disturbed."""
        given = {**self.recipe("plain", seconds=0.0, layout="single", workers=1)}
        plan = make_plan(load_job(given, cluster=self.settings), "plain")
        run, strategy, device = plan.job.run, plan.strategy, torch.device("cpu")
        players = load_players(run, strategy.players, device, strategy.updates)
        networks = Networks(players, Teachers(strategy.signals), device)
        stages = StageGroup(strategy.stages, plan.endpoints["teacher"], 1, plan.vocabulary)
        losses = {}
        for step, table in enumerate(read_bundles(plan.order, 0, 1, False), start=1):
            bundles, progress = [from_table(stages(table))], Progress(step - 1, plan.steps)
            losses[step] = train_step(strategy, networks, bundles, progress, run, Wish.NOTHING)[1]["loss"]
        return losses

    def start(self, recipe: Mapping[str, Any], settings: Mapping[str, Any] | None = None, command: Sequence[str] = ()) -> Run:
        """A driver, in a process of its own, on a cluster that is whole."""
        self.mend()
        name = recipe["name"]
        (self.home / f"{name}.yaml").write_text(yaml.safe_dump(dict(recipe)))
        (self.home / f"{name}.cluster.yaml").write_text(yaml.safe_dump({**self.settings, **(settings or {})}))
        words = command or ["run", str(self.home / f"{name}.yaml")]
        log = self.home / f"{name}.log"
        with log.open("ab") as out:
            driver = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *words, "--cluster", str(self.home / f"{name}.cluster.yaml")],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env={**os.environ, **self.cluster.environment},
            )
        return Run(self, name, driver, log)

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of the cluster with `title` in their names, oldest first."""
        found = []
        for pid in loopback.processes(self.cluster):
            try:
                process = psutil.Process(pid)
                if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda p: p.create_time())

    def node_of(self, process: psutil.Process) -> int:
        """Number of the node that a process belongs to."""
        for number, node in enumerate(self.cluster.nodes):
            top = node.found()
            if top is not None and process in top.children(recursive=True):
                return number
        raise AssertionError(f"{process} belongs to no node")

    def far(self, title: str) -> tuple[psutil.Process, int]:
        """A process with this title on another node than the driver's, and the number of its node."""
        placed = [(p, self.node_of(p)) for p in self.processes(title)]
        return next((p, n) for p, n in placed if n > 0)

    def kill_node(self, number: int) -> None:
        """All of a node at once: its raylet, its workers, and who started them."""
        top = self.cluster.nodes[number].found()
        assert top is not None
        for process in (top, *top.children(recursive=True)):
            process.kill()

    def mend(self) -> None:
        """As many nodes are there again as in the beginning."""
        there = sum(node.found() is not None for node in self.cluster.nodes)
        for _ in range(self.nodes - there):
            self.cluster = loopback.join(self.cluster, SIZE)

    def orphans(self, seconds: float = 40.0) -> list[str]:
        """What is left of runs that ended, after so long at most."""
        end = time.monotonic() + seconds
        while (left := self._left()) and time.monotonic() < end:
            time.sleep(0.5)
        return left

    def _left(self) -> list[str]:
        ours = [" ".join(p.cmdline()) for title in TITLES for p in self.processes(f"ray::{title}")]
        mine = [" ".join(p.cmdline()) for p in psutil.process_iter() if p.pid != os.getpid() and self._is_mine(p)]
        return ours + mine

    def _is_mine(self, process: psutil.Process) -> bool:
        """Whether it is a driver or a watchdog of a run here."""
        try:
            return any(str(self.home) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


@dataclass
class Run:
    """A driver under way, and what it leaves."""

    arena: Arena
    name: str
    driver: subprocess.Popen[bytes]
    log: Path

    @property
    def folder(self) -> Path:
        return self.arena.home / "runs" / self.name

    @property
    def said(self) -> str:
        return " ".join(self.log.read_text(errors="replace").split())

    def wait_for(self, found: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not found():
            assert self.driver.poll() is None, f"the driver ended before {what}: {self.said[-3000:]}"
            assert time.monotonic() < end, f"no {what} in {seconds:g} seconds: {self.said[-3000:]}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        journal = self.folder / "metrics.jsonl"
        self.wait_for(lambda: journal.exists() and f'"step": {step},' in journal.read_text(), f"step {step}")

    def wait_for_checkpoint(self, step: int) -> None:
        """Steps go on while a checkpoint is on its way. Once it is committed, no fault goes back any further."""
        folder = Folder(str(self.folder))
        self.wait_for(lambda: newest_commit(folder) >= step, f"checkpoint after step {step}")

    def finish(self, seconds: float = PATIENCE_SECONDS) -> Run:
        """Waits for a good end."""
        try:
            self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            self.driver.send_signal(signal.SIGKILL)
            raise AssertionError(f"no end in {seconds:g} seconds: {self.said[-3000:]}") from None
        assert self.driver.returncode == 0, self.said[-3000:]
        return self

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Journal rows of optimizer steps, as they lie in the run's folder."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # another process may be writing the last
        return [r for r in rows if "loss" in r["values"]]

    @property
    def curve(self) -> dict[int, float]:
        """Loss of each step. Asserts that every step is there once, and that it learnt from the very rows of the order."""
        home, steps = self.arena.home, self.steps
        assert [r["step"] for r in steps] == list(range(1, self.arena.steps + 1))
        job = load_job(self.folder / "recipe.yaml", cluster={"storage": str(home / "runs")})
        (prepared,) = (home / "runs" / "data").glob("data-*")
        order = Order(str(prepared), job.run.seed, self.arena.steps, 1, batch_rows=self.arena.rows)
        assert [r["values"]["row_id_sum"] for r in steps] == [order.step_rows(s).sum() for s in range(1, self.arena.steps + 1)]
        return {r["step"]: r["values"]["loss"] for r in steps}

    @property
    def status(self) -> str:
        """Of the MLflow run."""
        record = RunRecord.load(self.folder)
        assert record is not None
        return str(connect(record.uri).get_run(record.run_id).info.status)

    def killed(self) -> Run:
        """Its driver is killed, without a word."""
        self.driver.kill()
        self.driver.wait()
        return self

    def resumed(self) -> Run:
        """Another driver that goes on with it."""
        settings = yaml.safe_load((self.arena.home / f"{self.name}.cluster.yaml").read_text())
        return self.arena.start({"name": self.name}, settings, ["run", "--resume", str(self.folder)])
