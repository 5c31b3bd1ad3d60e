"""Training tokens/s of two workers over one, a compute thread each, on the same steps of a second or more and a stored signal.

What is lost is what two workers cost: the gradients' way, bundles of uneven work, and the stream beside them on the same cores.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.loop import LoopSpec, prepare_rows, run_loop
from tests.benchmarks.material import Material, standard_library
from tests.benchmarks.product import Setup, recipe, run
from tests.benchmarks.window import Window

NAME = "scale-1-to-2"
SETUPS = (Setup("1 worker", 1, "ddp", worker_threads=1), Setup("2 workers", 2, "ddp", worker_threads=1))
BATCH_ROWS = 128
"""Rows of 128 tokens: a step of one worker takes some seconds, of two more than one."""


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds; sides take turns."""
    window = Window(1, 2, 1) if settings.smoke else Window(3, 10, 2)
    rows = 8 if settings.smoke else BATCH_ROWS
    material = standard_library(settings.folder / "material", settings.smoke)
    data = {"held_out_rows": 8, "max_length_tokens": 128, "max_rows": 8 if settings.smoke else 120}
    train = {"batch_rows": rows, "lr": 4e-3, "steps": window.steps}
    speeds: dict[str, list[float]] = {setup.name: [] for setup in SETUPS}
    seconds: dict[str, list[float]] = {setup.name: [] for setup in SETUPS}
    waits: dict[str, list[float]] = {setup.name: [] for setup in SETUPS}
    machines = machine_scaling(settings, material, recipe(material, SETUPS[0], {**train, "steps": 1}, data, {"top_k": 64}))
    print(f"two bare loops over one: {machines:.2f}", flush=True)
    for turn in range(settings.rounds):
        for setup in SETUPS:
            content = recipe(material, setup, train, data, {"top_k": 64}) | {"signals": "store"}
            done = run(settings.folder / f"{setup.workers}-{turn}", content, setup, settings.folder / "runs")
            first, last = window.warm_up + 1, window.warm_up + window.measured
            speeds[setup.name].append(done.trace().tokens_per_second(window))
            seconds[setup.name].append(done.median_of("step_seconds", first, last))
            waits[setup.name].append(done.median_of("stream_wait_seconds", first, last))
            print(f"{setup.name}: {speeds[setup.name][-1]:,.0f} tokens/s, load {os.getloadavg()[0]:.1f}", flush=True)
    return Figure(
        name=NAME,
        value=median(speeds["2 workers"]) / median(speeds["1 worker"]),
        unit="tokens/s over tokens/s",
        against="one worker of one thread, on the same rows and steps",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "tokens_per_second": speeds,
            "step_seconds": seconds,
            "stream_wait_seconds": waits,
            "batch_rows": rows,
            "two_bare_loops_over_one": machines,
            "parameters": material.parameters,
        },
    )


def machine_scaling(settings: Settings, material: Material, content: dict[str, object]) -> float:
    """Tokens/s of two bare loops of one thread side by side over one alone: what this machine's cores give those who share nothing."""
    window = Window(1, 2, 1) if settings.smoke else Window(3, 20, 2)
    rows = prepare_rows(content, settings.folder / "runs" / "data")
    spec = LoopSpec(str(material.student), str(material.teacher), rows, window.steps, batch_rows=4 if settings.smoke else 16, threads=1)

    def speed(name: str) -> float:
        return run_loop("tests.benchmarks.bare_loop", spec, settings.folder / name).tokens_per_second(window)

    alone = speed("alone")
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(speed, ("left", "right"))) / alone
