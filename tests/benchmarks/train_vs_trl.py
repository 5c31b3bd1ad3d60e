"""Off-policy distillation on rows of uneven length, against TRL's GKDTrainer with the same rows in the same order.

TRL is not a dependency. `pip install -e .[bench]` adds it; to leave an environment as it is,
`pip install --no-deps --target FOLDER trl` and run with `PYTHONPATH=FOLDER`.

What differs: TRL takes the forward KL over the whole vocabulary, the product over the teacher's top 64 and one bucket;
TRL pads on the left and computes logits of every position, the product only of the completion's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, replace

from jobs.quickstart import VOCABULARY
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.loop import LoopSpec, prepare_rows, run_loop
from tests.benchmarks.material import Material, make
from tests.benchmarks.product import ROOT, Setup, recipe, run
from tests.benchmarks.window import Window

NAME = "train-vs-trl"
DATA = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
BATCH_ROWS, ROW_TOKENS = 16, 512
TRAIN = {"batch_rows": BATCH_ROWS, "lr": 1e-3, "lr_schedule": "constant", "weight_decay": 0.05, "betas": [0.9, 0.95]}
STRATEGY = {"kd_weight": 1.0, "ce_weight": 0.0}
SETUPS = (Setup("1 worker, 1 scorer"), Setup("2 workers, 1 scorer", workers=2, layout="ddp"))
TRL_THREADS = (2, 1)


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds: the better of two product setups over TRL with its better number of threads."""
    check_installed(NAME)
    window = Window(2, 3, 1) if settings.smoke else Window(20, 60, 20)
    material = questions(NAME, settings)
    data = {"held_out_rows": 8 if settings.smoke else 64, "max_length_tokens": ROW_TOKENS, "overlong": "quarantine"}
    setups = SETUPS[:1] if settings.smoke else SETUPS
    recipes = {s: recipe(material, s, {**TRAIN, "steps": window.steps}, data, STRATEGY) for s in setups}
    storage = settings.folder / "runs"
    spec = LoopSpec(
        student=str(material.student),
        teacher=str(material.teacher),
        rows=prepare_rows(recipes[setups[0]], storage / "data"),
        steps=window.steps,
        batch_rows=BATCH_ROWS,
        threads=2,
        lr=1e-3,
    )
    raw: dict[str, list[float]] = {}
    for turn in range(settings.rounds):
        for threads in TRL_THREADS:
            theirs = run_loop("tests.benchmarks.trl_loop", replace(spec, threads=threads), settings.folder / "trl")
            _note(raw, f"GKDTrainer, threads={threads}", theirs.tokens_per_second(window))
        for setup in setups:
            ours = run(settings.folder / f"turn{turn}", recipes[setup], setup, storage).trace()
            if ours.tokens != theirs.tokens:
                raise SystemExit(f"{NAME}: the sides read different rows; {setup.name} {ours.tokens[:3]}, TRL {theirs.tokens[:3]} ...")
            _note(raw, setup.name, ours.tokens_per_second(window))
    sizes = {"parameters": material.parameters, "tokens_of_a_step": median(theirs.tokens), "batch_rows": BATCH_ROWS}
    return _figure(settings, window, raw, {**sizes, "longest_row_tokens": ROW_TOKENS})


def questions(name: str, settings: Settings, vocabulary: int = VOCABULARY) -> Material:
    """GSM8K's rows as prompt and completion, and models of the quickstart's shapes with a tokenizer made for them."""
    path = settings.data or DATA
    if not path.exists():
        raise SystemExit(f"{name}: got no file {path}; expected JSONL with question and answer. Give GSM8K's train.jsonl as --data.")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in found]
    rows = rows[:400] if settings.smoke else rows
    return make(settings.folder / "material", rows, (row["prompt"] + row["completion"] for row in rows), settings.smoke, vocabulary)


def check_installed(name: str) -> None:
    """`SystemExit` with what to do when TRL cannot be imported."""
    if importlib.util.find_spec("trl") is None:
        how = " ".join((__doc__ or "").split("\n\n")[1].split())
        raise SystemExit(f"{name}: got no trl; expected it to be installed. {how}")


def _note(raw: dict[str, list[float]], side: str, speed: float) -> None:
    raw.setdefault(side, []).append(speed)
    print(f"{side}: {speed:,.0f} tokens/s", flush=True)


def _figure(settings: Settings, window: Window, raw: Mapping[str, list[float]], sizes: Mapping[str, object]) -> Figure:
    medians = {side: median(speeds) for side, speeds in raw.items()}
    ours = max((s.name for s in SETUPS if s.name in medians), key=medians.__getitem__)
    theirs = max((side for side in medians if side.startswith("GKDTrainer")), key=medians.__getitem__)
    return Figure(
        name=NAME,
        value=medians[ours] / medians[theirs],
        unit="tokens/s over tokens/s",
        against="trl.experimental.gkd.GKDTrainer, lmbda=0, beta=0 (forward KL), without gradient checkpointing",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "value_of": f"{ours} over {theirs}",
            "median_tokens_per_second": medians,
            "rounds": raw,
            "steps": asdict(window),
            **sizes,
        },
    )
