"""Two teachers, one of another tokenizer, a mixture that follows the gap, and rows that the student writes: the whole and its parts.

The recipe `tiny_together.yaml` for more steps of more rows, with one thing left out at a time. Every side begins with the same random
student, and all but the sides that write read the same number of rows. What is finished stays in the scratch folder (`--folder`) and is
not done again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jobs import quickstart, task
from orchestrator import run as runs
from orchestrator.display import Display
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine
from tests.benchmarks.verifiable_task import spread

NAME = "together"
DOMAINS = ("code", "arithmetic")
WHOLE, CONTROL = "whole", "no teacher"
SIDES: dict[str, tuple[str, ...]] = {
    WHOLE: (),
    "domains by their rows": ("curriculum.control=random",),
    "no rows of its own": ("strategy.student_share=0",),
    "teacher of code": ("strategy.teachers=[code]", "strategy.foreign={}", "curriculum=null"),
    "teacher of arithmetic": ("strategy={type: alm, teacher: arithmetic, ce_weight: 0.5}", "curriculum=null"),
    CONTROL: ("strategy=cross-entropy", "endpoints={}", "curriculum=null"),
}
"""Overrides of the recipe."""
USED = {"teacher of code": ("code",), "teacher of arithmetic": ("arithmetic",), CONTROL: ()}
"""Teachers of the sides that do without one."""
SIZES = (
    "train.steps=200",
    "train.warmup_steps=20",
    "train.batch_rows=16",
    "train.lr_final_share=0.1",
    "data.held_out_rows=128",
    "checkpoint.every_steps=100",
)
SMOKE = ("train.steps=4", "train.warmup_steps=0", "train.batch_rows=4", "data.held_out_rows=32", "data.max_rows=64")


def measure(settings: Settings) -> Figure:
    """The figure is the whole's cross-entropy over that without a teacher, means over domains and seeds."""
    os.environ.pop("RAY_ADDRESS", None)
    folder, display, small = settings.folder, Display(), SMOKE if settings.smoke else ()
    _prepare(folder, display, small)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in settings.seeds:
        for side in settings.methods or SIDES:
            found.setdefault(side, []).append(run(folder, side, seed, display, small))
        print(f"\nAfter seed {seed}:\n\n{table(found)}\n", flush=True)
    return Figure(
        name=NAME,
        value=ratio(found),
        unit="nats per token over nats per token",
        against="the same student, steps and rows by cross-entropy alone; held-out rows of both domains",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "seeds": list(settings.seeds), "runs": found},
    )


def run(folder: Path, side: str, seed: int, display: Display, small: Sequence[str]) -> dict[str, float]:
    """Held-out cross-entropy of each domain at the end of a side's run, which is made unless it is there, and tokens that it read."""
    name = f"{side.replace(' ', '-')}-{seed}"
    if not (folder / "runs" / name / "student").exists():
        chosen = [f"endpoints={json.dumps({n: {'model': str(path)} for n, path in teachers(folder, side).items()})}"]
        runs.distill(
            quickstart.RECIPES / "tiny_together.yaml",
            [*_places(folder), *SIZES, *SIDES[side], *chosen, f"name={name}", f"seed={seed}", "evaluate.every_steps=20", *small],
            {"storage": str(folder / "runs"), "mlflow": {"experiment": NAME}},
            display=display,
        )
    lines = [json.loads(line)["values"] for line in (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [values for values in lines if "eval/cross_entropy" in values][-1]
    return {**{d: last[f"eval/cross_entropy/{d}"] for d in DOMAINS}, "tokens": sum(values.get("tokens", 0.0) for values in lines)}


def teachers(folder: Path, side: str) -> dict[str, Path]:
    """Endpoints of a side, and where their models lie."""
    models = {"code": folder / "quickstart" / "teacher", "arithmetic": folder / "task" / "teacher"}
    return {name: models[name] for name in USED.get(side, DOMAINS)}


def ratio(found: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """NaN where a side was not run."""
    means = {side: float(np.mean([[r[d] for d in DOMAINS] for r in of_seeds])) for side, of_seeds in found.items()}
    return means[WHOLE] / means[CONTROL] if {WHOLE, CONTROL} <= means.keys() else math.nan


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: a line for each side, mean and standard deviation over seeds."""
    columns = {**{d: (f"cross-entropy, {d}", "{:.3f}") for d in DOMAINS}, "tokens": ("tokens read", "{:,.0f}")}
    lines = [["side", *(title for title, _ in columns.values())], ["---"] * (len(columns) + 1)]
    lines += [[side, *(spread([r[n] for r in of], pattern) for n, (_, pattern) in columns.items())] for side, of in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prepare(folder: Path, display: Display, small: Sequence[str]) -> None:
    """Text of both domains and both teachers, unless they are there."""
    task.prepare(folder / "task")
    task.train(folder / "task", "teacher", display, more=small)
    quickstart.prepare(folder / "quickstart")
    quickstart.train_teacher(folder / "quickstart", display, small)


def _places(folder: Path) -> list[str]:
    homes = {"code": folder / "quickstart" / "data", "arithmetic": folder / "task" / "data"}
    data = {split: {domain: str(home / f"{split}.jsonl") for domain, home in homes.items()} for split in ("train", "held_out")}
    return [*(f"data.{split}={json.dumps(paths)}" for split, paths in data.items()), f"student.model={folder}/quickstart/shapes/student"]
