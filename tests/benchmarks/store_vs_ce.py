"""How much of the speed of plain training is left when a teacher's signals come from a store: tokens/s over tokens/s.

The same student, rows, optimizer and product on both sides: the strategy `logits` from a finished store (packed, top 64)
over `cross-entropy`, which has no teacher at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.material import standard_library
from tests.benchmarks.product import ROOT, TAIL_LINES, Setup, environment, recipe, run
from tests.benchmarks.train_vs_bare import BATCH_ROWS, ROW_TOKENS, TRAIN
from tests.benchmarks.window import Window

NAME = "store-vs-ce"
SETUP = Setup("1 worker")
DOCUMENTS = 120
"""Modules of the standard library: more rows than the steps read."""
SIDES = ("store", "cross-entropy")


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds."""
    window = Window(2, 3, 1) if settings.smoke else Window(20, 80, 20)
    material = standard_library(settings.folder / "material", settings.smoke)
    data = {"held_out_rows": 8 if settings.smoke else 64, "max_length_tokens": ROW_TOKENS, "max_rows": 8 if settings.smoke else DOCUMENTS}
    taught = recipe(material, SETUP, {**TRAIN, "steps": window.steps}, data, {"top_k": 64}) | {"signals": "store"}
    plain = {name: value for name, value in taught.items() if name not in ("endpoints", "signals")} | {"strategy": "cross-entropy"}
    storage = settings.folder / "runs"
    captured = generate(settings.folder / "generate", taught, storage)
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    loads = []
    for turn in range(settings.rounds):
        for side, content in zip(SIDES, (taught, plain), strict=True):
            done = run(settings.folder / f"{side}{turn}", content, SETUP, storage)
            speeds[side].append(done.trace().tokens_per_second(window))
            loads.append(os.getloadavg()[0])
            print(f"{side}: {speeds[side][-1]:,.0f} tokens/s, load {loads[-1]:.1f}", flush=True)
    return Figure(
        name=NAME,
        value=median(speeds["store"]) / median(speeds["cross-entropy"]),
        unit="tokens/s over tokens/s",
        against="the same student, rows and product on cross-entropy alone",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "tokens_per_second": speeds,
            "loads": loads,
            "captured": captured,
            "parameters": material.parameters,
            "batch": {"rows": BATCH_ROWS, "row_tokens": ROW_TOKENS},
        },
    )


def generate(folder: Path, content: dict[str, Any], storage: Path) -> str:
    """Fills the stores of a recipe with `distill generate`; returns what it printed. `SystemExit` when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"recipe": folder / "recipe.yaml", "cluster": folder / "cluster.yaml"}
    paths["recipe"].write_text(json.dumps(content), encoding="utf-8")
    paths["cluster"].write_text(json.dumps({"storage": str(storage)}), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.cli", "generate", str(paths["recipe"]), "--cluster", str(paths["cluster"])]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-TAIL_LINES:]))
    return done.stdout
