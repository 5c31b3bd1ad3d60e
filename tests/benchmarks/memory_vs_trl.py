"""Peak resident memory of a training worker against TRL's GKDTrainer process, at a vocabulary of 131,072.

Both train the same student on the same rows in the same order. TRL holds the teacher in its own process, as it must; the
product's teacher scores in another process, which is not counted: that is what having it outside means. The whole process is
counted on both sides, with interpreter and libraries. TRL runs with and without gradient checkpointing, and the figure holds
the smaller of both; the product runs without. How to install TRL: `train_vs_trl.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.loop import LoopSpec, prepare_rows, run_loop
from tests.benchmarks.peak import watching
from tests.benchmarks.product import Setup, recipe, run
from tests.benchmarks.train_vs_trl import check_installed, questions

NAME = "memory-vs-trl"
VOCABULARY = 131_072
BATCH_ROWS, ROW_TOKENS = 8, 512
TRAIN = {"batch_rows": BATCH_ROWS, "lr": 1e-3, "lr_schedule": "constant", "weight_decay": 0.05, "betas": [0.9, 0.95]}
STRATEGY = {"kd_weight": 1.0, "ce_weight": 0.0}
OURS = Setup("training worker")
THEIRS = {"GKDTrainer": False, "GKDTrainer, gradient checkpointing": True}
TITLES = {OURS.name: "RayTrainWorker"} | dict.fromkeys(THEIRS, "tests.benchmarks.trl_loop")


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds: the product's worker over TRL's smaller process."""
    check_installed(NAME)
    steps, vocabulary = (3, 4_096) if settings.smoke else (10, VOCABULARY)
    material = questions(NAME, settings, vocabulary)
    data = {"held_out_rows": 8, "max_length_tokens": ROW_TOKENS, "overlong": "quarantine"}
    content = recipe(material, OURS, {**TRAIN, "steps": steps}, data, STRATEGY)
    storage = settings.folder / "runs"
    spec = LoopSpec(
        student=str(material.student),
        teacher=str(material.teacher),
        rows=prepare_rows(content, storage / "data"),
        steps=steps,
        batch_rows=BATCH_ROWS,
        threads=len(os.sched_getaffinity(0)),
        lr=1e-3,
    )
    raw: dict[str, list[int]] = {}
    for turn in range(settings.rounds):
        for side, checkpointing in THEIRS.items():
            with watching(TITLES[side]) as peak:
                theirs = run_loop("tests.benchmarks.trl_loop", replace(spec, gradient_checkpointing=checkpointing), settings.folder / "trl")
            _note(raw, side, peak.bytes)
        with watching(TITLES[OURS.name]) as peak:
            ours = run(settings.folder / f"turn{turn}", content, OURS, storage).trace()
        if ours.tokens != theirs.tokens:
            raise SystemExit(f"{NAME}: the sides read different rows; ours {ours.tokens[:3]}, TRL {theirs.tokens[:3]} ...")
        _note(raw, OURS.name, peak.bytes)
    sizes = {"parameters": material.parameters, "tokens_of_a_step": ours.tokens, "batch_rows": BATCH_ROWS, "vocabulary": vocabulary}
    return _figure(settings, raw, sizes)


def _note(raw: dict[str, list[int]], side: str, peak: int) -> None:
    raw.setdefault(side, []).append(peak)
    print(f"{side}: {peak / 2**20:,.0f} MiB", flush=True)


def _figure(settings: Settings, raw: Mapping[str, list[int]], sizes: Mapping[str, object]) -> Figure:
    medians = {side: median(peaks) for side, peaks in raw.items()}
    smaller = min(THEIRS, key=medians.__getitem__)
    return Figure(
        name=NAME,
        value=medians[OURS.name] / medians[smaller],
        unit="bytes over bytes",
        against="the process of trl.experimental.gkd.GKDTrainer, lmbda=0, beta=0 (forward KL), teacher within",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "value_of": f"{OURS.name} over {smaller}",
            "median_bytes": medians,
            "rounds": raw,
            **sizes,
        },
    )
