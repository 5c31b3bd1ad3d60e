"""The product's side: the `distill` command in a process of its own, read back from the files that every run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.material import Material
from tests.benchmarks.window import Trace

ROOT = Path(__file__).parents[2]
TAIL_LINES = 25


@dataclass(frozen=True)
class Setup:
    """One way to run the product."""

    name: str
    workers: int = 1
    layout: str = "single"
    worker_threads: int | None = None
    scorer_threads: int | None = None
    """Compute threads of each process; as the product shares them out when None."""
    read_ahead_bundles: int | None = None
    scorers: int = 1


@dataclass(frozen=True)
class Run:
    """A finished run of the product."""

    folder: Path
    started: float
    """Unix seconds at which the command was given."""
    lines: tuple[tuple[float, str], ...]
    """What it said, with Unix seconds."""

    def steps(self) -> list[dict[str, Any]]:
        """`step`, `time` and `values` of every optimizer step, from the journal."""
        lines = (json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [line for line in lines if "step_seconds" in line["values"]]

    def trace(self) -> Trace:
        steps = self.steps()
        return Trace(
            tuple(s["time"] for s in steps),
            tuple(int(s["values"]["tokens"]) for s in steps),
            tuple(s["values"]["loss"] for s in steps),
        )

    def median_of(self, metric: str, first: int, last: int) -> float:
        """Median of a metric over steps `first` to `last`."""
        values = sorted(s["values"][metric] for s in self.steps() if first <= s["step"] <= last)
        return float(values[len(values) // 2])


def recipe(
    material: Material, setup: Setup, train: Mapping[str, Any], data: Mapping[str, Any], strategy: Mapping[str, Any]
) -> dict[str, Any]:
    """A recipe like the quickstart's: logits of one teacher, AdamW, no control."""
    threads = {} if setup.scorer_threads is None else {"resources": {"threads": setup.scorer_threads}}
    ahead = {} if setup.read_ahead_bundles is None else {"read_ahead_bundles": setup.read_ahead_bundles}
    return {
        "student": {"model": str(material.student)},
        "strategy": {"type": "logits", **strategy},
        "endpoints": {"teacher": {"model": str(material.teacher), "actors": setup.scorers, **threads}},
        "data": {"train": str(material.data), **data},
        "train": {"workers": setup.workers, "layout": setup.layout, **ahead, **train},
    }


def run(folder: Path, content: Mapping[str, Any], setup: Setup, storage: Path | None = None) -> Run:
    """Runs a recipe to its end; prepared data is shared by runs of one `storage`. `SystemExit` when the run fails."""
    folder.mkdir(parents=True, exist_ok=True)
    store = storage or folder / "runs"
    name = f"{folder.name}-{time.time_ns()}"
    cluster = {"storage": str(store)} | ({"resources": {"worker": {"threads": setup.worker_threads}}} if setup.worker_threads else {})
    paths = {"recipe": folder / "recipe.yaml", "cluster": folder / "cluster.yaml"}
    paths["recipe"].write_text(json.dumps({**content, "name": name}), encoding="utf-8")
    paths["cluster"].write_text(json.dumps(cluster), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.cli", "run", str(paths["recipe"]), "--cluster", str(paths["cluster"])]
    started = time.time()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    lines = tuple((time.time(), line.rstrip()) for line in process.stdout)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n" + "\n".join(t for _, t in lines[-TAIL_LINES:]))
    return Run(store / name, started, lines)


def environment() -> dict[str, str]:
    """This process's environment without what would send a run elsewhere, and without a network."""
    foreign = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return {**kept, "HF_HUB_OFFLINE": "1"}
