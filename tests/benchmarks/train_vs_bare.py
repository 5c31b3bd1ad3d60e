"""How much of a bare loop's speed is left once Ray streams, journals and can resume: tokens/s over tokens/s."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.loop import LoopSpec, prepare_rows, run_loop
from tests.benchmarks.material import standard_library
from tests.benchmarks.product import Run, Setup, recipe, run
from tests.benchmarks.window import Trace, Window, first_losses_differ

NAME = "train-vs-bare"
BATCH_ROWS, ROW_TOKENS = 16, 128
TRAIN = {"batch_rows": BATCH_ROWS, "lr": 4e-3, "lr_schedule": "constant", "weight_decay": 0.05, "betas": [0.9, 0.95]}
SHIPPED = (Setup("1 worker, 1 scorer"), Setup("2 workers, 1 scorer", workers=2, layout="ddp"))
"""What a recipe like the quickstart's gives without further settings. The value is the better one's."""
ALTERNATIVES = (
    Setup("1 worker 1 thread, scorer 1 thread", worker_threads=1, scorer_threads=1),
    Setup("1 worker 2 threads, scorer 2 threads", worker_threads=2, scorer_threads=2),
    Setup("1 worker 1 thread, scorer 2 threads", worker_threads=1, scorer_threads=2),
    Setup("1 worker, 1 scorer, read ahead 16", read_ahead_bundles=16),
    Setup("1 worker 1 thread, 2 scorers 1 thread", worker_threads=1, scorer_threads=1, scorers=2),
    Setup("2 workers, 2 scorers", workers=2, layout="ddp", scorers=2),
)
BARE_THREADS = (2, 1)


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds, product over the bare loop with 2 threads."""
    window = Window(2, 3, 1) if settings.smoke else Window(20, 80, 20)
    material = standard_library(settings.folder / "material", settings.smoke)
    data = {"held_out_rows": 8 if settings.smoke else 64, "max_length_tokens": ROW_TOKENS}
    setups = SHIPPED[:1] if settings.smoke else SHIPPED + (ALTERNATIVES if settings.alternatives else ())
    recipes = {s: recipe(material, s, {**TRAIN, "steps": window.steps}, data, {}) for s in setups}
    storage = settings.folder / "runs"
    spec = LoopSpec(
        student=str(material.student),
        teacher=str(material.teacher),
        rows=prepare_rows(recipes[setups[0]], storage / "data"),
        steps=window.steps,
        batch_rows=BATCH_ROWS,
        threads=2,
    )
    raw: dict[str, list[dict[str, float]]] = {}
    for turn in range(settings.rounds):
        for threads in BARE_THREADS:
            bare = run_loop("tests.benchmarks.bare_loop", replace(spec, threads=threads), settings.folder / "bare")
            _note(raw, f"bare loop, threads={threads}", {"tokens_per_second": bare.tokens_per_second(window)})
        for setup in setups:
            done = run(settings.folder / f"turn{turn}", recipes[setup], setup, storage)
            _note(raw, setup.name, {**_numbers(done, window), "first_loss_difference": first_losses_differ(done.trace(), bare)})
    return _figure(settings, window, raw, material.parameters, bare)


def _numbers(done: Run, window: Window) -> dict[str, float]:
    """Throughput of the measured steps, and where their time went."""
    last = window.warm_up + window.measured
    timing = {m: done.median_of(m, window.warm_up + 1, last) for m in ("step_seconds", "stream_wait_seconds", "score_seconds/teacher")}
    return {"tokens_per_second": done.trace().tokens_per_second(window), **timing}


def _note(raw: dict[str, list[dict[str, float]]], side: str, numbers: dict[str, float]) -> None:
    numbers = {**numbers, "load": os.getloadavg()[0]}
    raw.setdefault(side, []).append(numbers)
    print(f"{side}: " + ", ".join(f"{name} {value:,.4g}" for name, value in numbers.items()), flush=True)


def _figure(
    settings: Settings, window: Window, raw: Mapping[str, list[dict[str, float]]], parameters: Mapping[str, int], bare: Trace
) -> Figure:
    medians = {side: median(n["tokens_per_second"] for n in numbers) for side, numbers in raw.items()}
    other = medians[f"bare loop, threads={BARE_THREADS[0]}"]
    ratios = {side: speed / other for side, speed in medians.items()}
    best = max((s.name for s in SHIPPED if s.name in ratios), key=ratios.__getitem__)
    return Figure(
        name=NAME,
        value=ratios[best],
        unit="tokens/s over tokens/s",
        against="a bare PyTorch loop with 2 threads: the same models, rows, loss and optimizer",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "value_of": best,
            "ratios": ratios,
            "median_tokens_per_second": medians,
            "rounds": raw,
            "steps": asdict(window),
            "parameters": parameters,
            "batch": {"rows": BATCH_ROWS, "row_tokens": ROW_TOKENS, "tokens": median(bare.tokens)},
        },
    )
