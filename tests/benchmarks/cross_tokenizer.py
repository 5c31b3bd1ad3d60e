"""Students whose tokenizers are not their teacher's, taught across them and by cross-entropy alone: held-out bits per byte.

The teacher is the quickstart's. A student has a BPE vocabulary of its own, or reads bytes. All methods of a student see the same rows in
the same steps, and both students the same number of bytes. Everything runs in one process, one Ray and one machine. What is finished
stays in the scratch folder (`--folder`) and is not done again, so that an interrupted call goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jobs import quickstart
from orchestrator import run as runs
from orchestrator.config import load_job
from orchestrator.data import prepare
from orchestrator.display import Display
from orchestrator.rows import Rows
from orchestrator.token_bytes import token_bytes
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine
from tests.benchmarks.verifiable_task import spread

NAME = "cross-tokenizer"
CONTROL = "cross-entropy"
METHODS: dict[str, dict[str, Any]] = {
    CONTROL: {"type": "cross-entropy"},
    "alm": {"type": "alm"},
    "alm-debias": {"type": "alm", "debias": True},
    "uld": {"type": "uld"},
    "gold": {"type": "gold"},
}
"""Strategies with their own defaults, and what `alm` has for tokens that end at other places."""
OTHER_VOCABULARY = 2048
ROW_TOKENS = {"bpe": 128, "bytes": 384}
"""Longest rows, of about as many bytes for either student."""
BYTES = 1_000_000
"""That every run learns from."""
BATCH_ROWS, HELD_OUT_ROWS = 16, 256
SHOWN = {"bits_per_byte": "{:.4f}", "bytes": "{:,.0f}", "tokens_per_second": "{:,.0f}"}
TRAIN = {"layout": "single", "lr": 1.2e-2, "lr_final_share": 0.05, "weight_decay": 0.05, "betas": [0.9, 0.95]}
SMOKE_TEACHER = ["train.steps=2", "train.warmup_steps=0", "train.batch_rows=4", "data.held_out_rows=8", "data.max_rows=64"]


def measure(settings: Settings) -> Figure:
    """The table of all students, methods and seeds; the figure is the best method's mean bits per byte over the control's, of the student
    for whom that is worse."""
    os.environ.pop("RAY_ADDRESS", None)
    bench = Bench(settings)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in settings.seeds:
        for student in ROW_TOKENS:
            for method in settings.methods or METHODS:
                found.setdefault(student, {}).setdefault(method, []).append(bench.run(student, method, seed))
        print(f"\nAfter seed {seed}:\n\n{table(found)}\n", flush=True)
    return Figure(
        name=NAME,
        value=ratio(found),
        unit="bits per byte over bits per byte",
        against="the same student, rows and steps by cross-entropy alone; the worse of a student with another BPE and one of bytes",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "seeds": list(settings.seeds), "runs": found},
    )


class Bench:
    """Teacher, students and data in a scratch folder, and what has been measured there."""

    def __init__(self, settings: Settings):
        self.folder, self.display, self.smoke = settings.folder / "languages", Display(), settings.smoke
        quickstart.prepare(self.folder)
        quickstart.train_teacher(self.folder, self.display, SMOKE_TEACHER if self.smoke else ())
        self.tokenizers = {"bpe": self._other(), "bytes": quickstart.byte_tokenizer()}
        for name, tokenizer in self.tokenizers.items():
            quickstart.write_shape(self.folder / "students" / name, tokenizer, quickstart.STUDENT, len(tokenizer))

    def run(self, student: str, method: str, seed: int) -> dict[str, float]:
        """One run and its measures, unless they are there."""
        kept = self.folder / "measured" / f"{student}-{method}-{seed}.json"
        if not kept.exists():
            measures = self._run(student, method, seed)
            kept.parent.mkdir(exist_ok=True)
            work = kept.with_suffix(".part")
            work.write_text(json.dumps(measures), encoding="utf-8")
            work.rename(kept)
        return dict(json.loads(kept.read_text(encoding="utf-8")))

    def _run(self, student: str, method: str, seed: int) -> dict[str, float]:
        recipe = self._recipe(student, METHODS[method], seed)
        train, held_out = self._sizes(student, recipe)
        steps = 2 if self.smoke else max(2, round(BYTES / (train * BATCH_ROWS)))
        recipe["train"] = {**TRAIN, "batch_rows": BATCH_ROWS, "steps": steps, "warmup_steps": steps // 10}
        made = runs.distill(recipe, (), self._cluster(), display=self.display)
        return {
            "bits_per_byte": made.metrics["eval/cross_entropy"] * held_out / math.log(2),
            "cross_entropy": made.metrics["eval/cross_entropy"],
            "bytes": steps * BATCH_ROWS * train,
            "steps": float(steps),
            "tokens_per_second": made.metrics["tokens_per_second"],
        }

    def _recipe(self, student: str, strategy: Mapping[str, Any], seed: int) -> dict[str, Any]:
        return {
            "student": {"model": str(self.folder / "students" / student), "init": "random"},
            "strategy": dict(strategy),
            "endpoints": {"teacher": {"model": str(self.folder / "teacher")}} if strategy["type"] != CONTROL else {},
            "data": {
                "train": str(self.folder / "data" / "train.jsonl"),
                "held_out": str(self.folder / "data" / "held_out.jsonl"),
                "held_out_rows": 8 if self.smoke else HELD_OUT_ROWS,
                "max_length_tokens": ROW_TOKENS[student],
                **({"max_rows": 64} if self.smoke else {}),
            },
            "seed": seed,
        }

    def _sizes(self, student: str, recipe: Mapping[str, Any]) -> tuple[float, float]:
        """Bytes of a train row, on average, and learnt tokens for each learnt byte of the held-out rows."""
        run = load_job({**recipe, "train": {**TRAIN, "steps": 1, "batch_rows": BATCH_ROWS, "warmup_steps": 0}}).run
        tokenizer: PreTrainedTokenizerBase = self.tokenizers[student]
        data = prepare(run.data, tokenizer, run.data.split_seed, self.folder / "runs" / "data")
        table = token_bytes(tokenizer, student)
        train, held_out = (Rows(data.folder, split) for split in ("train", "held_out"))
        sample = train.read(np.unique(np.linspace(0, len(train) - 1, 512).astype(np.int64)))
        measured = held_out.read(np.arange(len(held_out)))
        learnt = measured["tokens"][measured["loss_mask"] != 0]
        return float(table.sizes(sample["tokens"]).sum() / len(sample["lengths"])), len(learnt) / float(table.sizes(learnt).sum())

    def _other(self) -> PreTrainedTokenizerBase:
        texts = [text for name, text in quickstart.sources() if not quickstart.held_out(name)]
        return quickstart.train_tokenizer(iter(texts[: 8 if self.smoke else None]), OTHER_VOCABULARY, single_digits=True)

    def _cluster(self) -> dict[str, object]:
        return {"storage": str(self.folder / "runs"), "mlflow": {"experiment": NAME}}


def ratio(found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> float:
    """Of means over seeds; NaN where the control or every method is missing."""
    worst = []
    for methods in found.values():
        means = {m: float(np.mean([r["bits_per_byte"] for r in of_seeds])) for m, of_seeds in methods.items()}
        taught = [mean for method, mean in means.items() if method != CONTROL]
        worst.append(min(taught) / means[CONTROL] if taught and CONTROL in means else math.nan)
    return max(worst, default=math.nan)


def table(found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> str:
    """Markdown: a line for each student and method, mean and standard deviation over seeds."""
    lines = ["| student | method | bits per byte | bytes learnt | tokens/s |", "|---|---|---|---|---|"]
    for student, methods in found.items():
        for method, of_seeds in methods.items():
            cells = [spread([r[name] for r in of_seeds], pattern) for name, pattern in SHOWN.items()]
            lines.append(f"| {student} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
