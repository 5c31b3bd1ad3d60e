"""What the three benchmarks of searches share: a recipe at the quickstart's size, and commands whose processor time is added up.

A command that has ended is kept in the benchmark's folder with what it took, so that a benchmark that was cut short goes on with
`--folder` where it was, and so that `search-cost` and `asha-cost` share the search without a scheduler in one folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.figure import Settings
from tests.benchmarks.material import standard_library
from tests.benchmarks.product import ROOT, TAIL_LINES, Setup, environment, recipe

SAMPLE_SECONDS = 0.5
TOOK = "took.json"
STRATEGY = {
    "type": "terms",
    "signals": {"teacher": {"endpoint": "teacher", "take": {"type": "topk", "top_k": 64}}},
    "terms": [{"objective": "forward-kl", "signal": "teacher", "weight": 0.9}, {"objective": "cross-entropy", "weight": 0.1}],
}
SPACE = {
    "strategy.terms.0.objective": {"choice": [{"type": "forward-kl"}, {"type": "jsd", "beta": 0.5}, {"type": "reverse-kl"}]},
    "strategy.terms.0.objective.temperature": {"uniform": [1, 4]},
    "strategy.terms.0.weight": {"uniform": [0.3, 1.0]},
    "train.lr": {"log_uniform": [2e-3, 3e-2]},
}
"""Temperature, weights, divergence and learning rate."""
TRIALS = 8
AT_ONCE = 2
"""Trials, one for each of two cores: a thread on its own takes fewer core-seconds than two that wait for one another."""
STEPS = 450
"""A live run of so many takes three minutes or more on two cores."""
SCHEDULERS: dict[str, Any] = {"none": "none", "asha": {"type": "asha"}}


@dataclass(frozen=True)
class Metered:
    """A command that ended."""

    wall_seconds: float
    core_seconds: float
    """Processor time of the command and of everything it started."""
    load_before: float
    """1-minute average load as it began."""


def sizes(settings: Settings) -> tuple[int, int]:
    """Steps of a trial, and trials."""
    return (12, 2) if settings.smoke else (STEPS, TRIALS)


def filled(settings: Settings) -> Metered:
    """The teacher's one pass over the rows, into a store."""
    made = content(settings.folder, sizes(settings)[0], settings.smoke)
    return metered(settings.folder / "generate", "generate", made, settings.folder / "runs", fresh=True)


def searched(settings: Settings, side: str, turn: int) -> tuple[Metered, Path]:
    """A search of the same points on that store, with one of `SCHEDULERS`, and its folder."""
    (steps, trials), name = sizes(settings), f"{side}{turn}"
    search = {
        "space": SPACE,
        "sampler": "random",
        "trials": trials,
        "concurrent": AT_ONCE,
        "scheduler": SCHEDULERS[side],
        "baseline": False,
    }
    made = {**content(settings.folder, steps, settings.smoke), "name": name, "search": search}
    return metered(settings.folder / name, "search", made, settings.folder / "runs"), settings.folder / "runs" / name


def content(folder: Path, steps: int, smoke: bool) -> dict[str, Any]:
    """A recipe of the quickstart's models and rows on one worker, evaluated twelve times; made once in `folder`."""
    kept = folder / f"recipe-{steps}-steps.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    material = standard_library(folder / "material", smoke)
    every = max(1, steps // 12)
    data = {"held_out_rows": 8 if smoke else 64, "max_length_tokens": 32 if smoke else 128, "max_rows": 8 if smoke else 120}
    train = {"steps": steps, "batch_rows": 4 if smoke else 16, "lr": 1.2e-2, "warmup_steps": steps // 10}
    made = recipe(material, Setup("1 worker"), train, data, {})
    made |= {"strategy": STRATEGY, "evaluate": {"every_steps": every}}
    kept.write_text(json.dumps(made), encoding="utf-8")
    return made


def metered(folder: Path, verb: str, content: Mapping[str, Any], storage: Path, fresh: bool = False) -> Metered:
    """Runs `distill VERB` on a recipe in a process of its own, or reads what it took when it has ended before. What is left of one that
    was cut short is removed, with `fresh` its whole storage. `SystemExit` when it fails."""
    if (folder / TOOK).exists():
        return Metered(**json.loads((folder / TOOK).read_text(encoding="utf-8")))
    for left in [storage] if fresh else storage.glob(f"{content.get('name', folder.name)}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"recipe": folder / "recipe.yaml", "cluster": folder / "cluster.yaml"}
    paths["recipe"].write_text(json.dumps(content), encoding="utf-8")
    paths["cluster"].write_text(json.dumps({"storage": str(storage)}), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.cli", verb, str(paths["recipe"]), "--cluster", str(paths["cluster"])]
    began, used, load = time.monotonic(), dict[tuple[int, float], float](), os.getloadavg()[0]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = psutil.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            _sample(process, used)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        tail = (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-TAIL_LINES:]
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n" + "\n".join(tail))
    took = Metered(time.monotonic() - began, sum(used.values()), load)
    (folder / TOOK).write_text(json.dumps(vars(took)), encoding="utf-8")
    return took


def _sample(process: psutil.Process, used: dict[tuple[int, float], float]) -> None:
    """Processor time so far of a process and all below it; what ends between two looks loses its last half second."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            times = member.cpu_times()
            used[member.pid, member.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            continue


def journal(folder: Path) -> list[dict[str, float]]:
    """Values of every step of a run."""
    lines = (json.loads(line)["values"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [values for values in lines if "step_seconds" in values]


def ended(folder: Path) -> list[dict[str, Any]]:
    """How the trials of a search ended, each at last."""
    lines = (json.loads(line) for line in (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines())
    return list({line["number"]: line for line in lines if line["event"] == "ended"}.values())


def best(trials: Sequence[Mapping[str, Any]]) -> float:
    """Lowest held-out cross-entropy of a trial that finished."""
    return min(float(t["metrics"]["eval/cross_entropy"]) for t in trials if t["outcome"] == "finished" and t["number"] >= 0)
