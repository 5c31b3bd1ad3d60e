"""Methods on a task whose answers can be judged: how often a student is right, and how far it is from its teacher on its own text.

The teacher is trained once, and a student is begun for every seed; from there each method goes on for the same number of steps of as
many texts. Everything runs in one process, one Ray and one machine. What is finished stays in the scratch folder (`--folder`) and is
not done again, so that an interrupted call goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import VerifierEndpoint
from jobs import task
from orchestrator import run as runs
from orchestrator.compare import evaluate_models
from orchestrator.comparison_rows import ChosenRows, rows_of_recipe
from orchestrator.config import load_job
from orchestrator.display import Display
from orchestrator.result import RECIPE
from orchestrator.written import Writing, evaluate_written
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine

NAME = "verifiable-task"
JUDGE = VerifierEndpoint(engine="verifier", kind="numeric")
MAX_NEW_TOKENS = 36
OFF_POLICY, ON_POLICY = "logits", ("gkd", "opd")
"""Whose divergences on own text make the figure."""
SMOKE = ["train.steps=2", "train.warmup_steps=0", "train.batch_rows=4", "data.held_out_rows=8", "data.max_rows=64"]
COLUMNS: dict[str, tuple[str, str]] = {
    "accuracy": ("right answers", "{:.1%}"),
    "own_reverse_kl": ("KL(q‖p), own text", "{:.4f}"),
    "own_forward_kl": ("KL(p‖q), own text", "{:.4f}"),
    "forward_kl": ("KL(p‖q), data", "{:.4f}"),
    "cross_entropy": ("cross-entropy, data", "{:.4f}"),
    "finished": ("finished", "{:.0%}"),
    "texts": ("texts", "{:,.0f}"),
    "tokens": ("tokens read", "{:,.0f}"),
    "seconds": ("seconds of steps", "{:,.0f}"),
}
"""What the table shows of every run, and how."""


def measure(settings: Settings) -> Figure:
    """The table of all methods and seeds; the figure is the on-policy methods' mean KL(q‖p) on own text over the off-policy one's."""
    os.environ.pop("RAY_ADDRESS", None)
    bench = Bench(settings)
    found = over_seeds(settings, bench, task.METHODS, bench.run)
    return Figure(
        name=NAME,
        value=ratio(found),
        unit="nats per token over nats per token",
        against="mean KL(student, teacher) on the student's own text, gkd and opd over logits, from the same start",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "seeds": list(settings.seeds), "teacher": bench.teacher(), "runs": found},
    )


def over_seeds(
    settings: Settings, bench: Bench, methods: Iterable[str], run: Callable[[str, int, Path], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    """Measures by method and seed of what `run` makes of the student that each seed begins with; prints the table after each seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in settings.seeds:
        begun = bench.begin(seed)
        found.setdefault("as begun", []).append(bench.measured("start", seed, begun, {}))
        for method in settings.methods or methods:
            found.setdefault(method, []).append(run(method, seed, begun))
        print(f"\nAfter seed {seed}:\n\n{table(bench.teacher(), found)}\n", flush=True)
    return found


class Bench:
    """The task in a scratch folder, and what has been measured there."""

    def __init__(self, settings: Settings):
        self.folder, self.display = settings.folder / "task", Display()
        self.small = SMOKE if settings.smoke else []
        task.prepare(self.folder)
        task.train(self.folder, "teacher", self.display, more=self.small)

    def begin(self, seed: int) -> Path:
        """The student of a seed from which all methods go on."""
        return task.train(self.folder, "start", self.display, seed, self.small)

    def run(self, method: str, seed: int, begun: Path, name: str | None = None, more: Sequence[str] = ()) -> dict[str, float]:
        """One run of the method's recipe and its measures, unless they are there; kept under `name` where `more` overrides it."""
        name = name or method
        if (kept := self._kept(name, seed)) is not None:
            return kept
        overrides = [*task.overrides(self.folder, method, begun), f"seed={seed}", *more, *self.small]
        began = time.perf_counter()
        made = runs.distill(task.recipe(method), overrides, task.cluster(self.folder), display=self.display)
        whole = time.perf_counter() - began
        return self.measured(name, seed, Path(made.student), {**compute(Path(made.folder)), "whole_seconds": whole})

    def measured(self, name: str, seed: int, student: Path, more: Mapping[str, float]) -> dict[str, float]:
        """Measures of a student, beside `more`; kept, and read again where they are."""
        if (kept := self._kept(name, seed)) is not None:
            return kept
        rows, teacher = self._rows(), str(self.folder / "teacher")
        wrote, teacher_wrote = evaluate_written(
            [str(student)], teacher, rows.rows, rows.indices, Writing(JUDGE, max_new_tokens=MAX_NEW_TOKENS)
        )
        score, teacher_score = evaluate_models([str(student)], teacher, rows.rows, rows.indices)
        self._keep("teacher", 0, {**numbers(teacher_score), **numbers(teacher_wrote)})
        found = {**numbers(score), **numbers(wrote), "tokens": 0.0, "texts": 0.0, "seconds": 0.0, **more}
        self._keep(name, seed, found)
        return found

    def teacher(self) -> dict[str, float]:
        """The teacher's own measures."""
        return self._kept("teacher", 0) or {}

    def _rows(self) -> ChosenRows:
        more = task.overrides(self.folder, "logits", self.folder / "start")
        return rows_of_recipe(task.recipe("logits"), [*more, *self.small], task.cluster(self.folder))

    def _file(self, name: str, seed: int) -> Path:
        return self.folder / "measured" / f"{name}-{seed}.json"

    def _kept(self, name: str, seed: int) -> dict[str, float] | None:
        file = self._file(name, seed)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def _keep(self, name: str, seed: int, found: Mapping[str, float]) -> None:
        file = self._file(name, seed)
        file.parent.mkdir(exist_ok=True)
        work = file.with_suffix(".part")
        work.write_text(json.dumps(found), encoding="utf-8")
        work.rename(file)


def numbers(scores: Any) -> dict[str, float]:
    """The numbers of a record that are there."""
    return {name: float(value) for name, value in asdict(scores).items() if isinstance(value, int | float)}


def compute(folder: Path) -> dict[str, float]:
    """What a run's steps took, by its journal: `texts` learnt from, `tokens` read with their prompts, and `seconds`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["values"] for line in lines if "step_seconds" in line["values"]]
    samples = getattr(load_job(folder / RECIPE).run.strategy, "samples", 1)
    return {
        "texts": samples * sum(step["rows"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "seconds": sum(step["step_seconds"] for step in steps),
    }


def ratio(found: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """Of means over seeds; NaN where a side was not run."""
    on = [run["own_reverse_kl"] for method in ON_POLICY for run in found.get(method, ())]
    off = [run["own_reverse_kl"] for run in found.get(OFF_POLICY, ())]
    return float(np.mean(on) / np.mean(off)) if on and off else math.nan


def table(teacher: Mapping[str, float], found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: a line for the teacher and each method, mean and standard deviation over seeds."""
    lines = [["method", *(title for title, _ in COLUMNS.values())], ["---"] * (len(COLUMNS) + 1)]
    shown = {"teacher": [{**teacher, "tokens": math.nan, "texts": math.nan, "seconds": math.nan}], **found}
    for method, of_seeds in shown.items():
        cells = [spread([run.get(name, math.nan) for run in of_seeds], pattern) for name, (_, pattern) in COLUMNS.items()]
        lines.append([method.replace("_", "-"), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], pattern: str) -> str:
    """`mean ± standard deviation`, the latter of a sample of at least two; a dash where there is nothing."""
    if any(math.isnan(value) for value in values):
        return "–"
    mean = pattern.format(float(np.mean(values)))
    return f"{mean} ± {pattern.format(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean
