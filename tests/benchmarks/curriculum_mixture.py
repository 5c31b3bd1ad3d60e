"""A mixture that follows the gap to the teacher against the data's own proportions: what is left of the gap, at equal tokens.

Two domains, sources of the standard library and generated sums. The teacher learns both alike; every student begins with the library
alone, and most rows are of the library, so that it lags behind in sums. All rows have the same length, and every side reads as many.
What is finished stays in the scratch folder (`--folder`) and is not done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jobs import arithmetic, quickstart
from orchestrator import run as runs
from orchestrator.display import Display
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine
from tests.benchmarks.material import TINY

NAME = "curriculum-mixture"
DOMAINS = ("library", "sums")
ROW_TOKENS = 64
VOCABULARY = 2048
ROWS = {"library": 9_000, "sums": 1_000}
"""To train on, of which the second domain has few."""
HELD_OUT_ROWS = 128
"""Of each domain."""
STEPS = {"teacher": 1_200, "start": 300, "side": 300}
SIDES: dict[str, dict[str, Any]] = {
    "gap": {"mixture": {"type": "ddk", "domains": list(DOMAINS)}},
    "own": {"mixture": {"type": "ddk", "domains": list(DOMAINS)}, "control": "random"},
    "even": {"mixture": {"type": "shares", "shares": dict.fromkeys(DOMAINS, 1)}},
}


def measure(settings: Settings) -> Figure:
    """The figure is the mean gap that is left with `gap` over that with `own`, over domains and seeds."""
    os.environ.pop("RAY_ADDRESS", None)
    bench = Bench(settings)
    teacher = bench.train("teacher", "teacher", SIDES["even"], {"type": "cross-entropy"}, STEPS["teacher"])
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for seed in settings.seeds:
        only_library = {"mixture": {"type": "shares", "shares": {"library": 1, "sums": 0}}}
        start = bench.train(f"start-{seed}", "student", only_library, {"type": "cross-entropy"}, STEPS["start"], seed)
        for side, curriculum in SIDES.items():
            folder = bench.train(f"{side}-{seed}", str(start), curriculum, {"type": "logits", "top_k": 64}, STEPS["side"], seed, teacher)
            found[side].append(gaps(folder.parent))
            print(f"{side}, seed {seed}: {found[side][-1]}", flush=True)
    return Figure(
        name=NAME,
        value=mean_gap(found["gap"]) / mean_gap(found["own"]),
        unit="nats per token over nats per token",
        against="cross-entropy above the teacher's, mean over domains, with domains drawn by their share of the rows",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "seeds": list(settings.seeds), "rows": ROWS, "steps": STEPS, "gaps": found},
    )


class Bench:
    """Data, shapes and runs in a scratch folder."""

    def __init__(self, settings: Settings):
        self.folder, self.smoke, self.display = settings.folder, settings.smoke, Display()
        if not (self.folder / "shapes" / "student").exists():
            self._prepare()

    def train(
        self,
        name: str,
        student: str,
        curriculum: Mapping[str, Any],
        strategy: Mapping[str, Any],
        steps: int,
        seed: int = 0,
        teacher: Path | None = None,
    ) -> Path:
        """The student of a run, which is done unless it is there; a `student` is a shape or a saved model."""
        made = self.folder / "runs" / name / "student"
        shape = self.folder / "shapes" / student
        if not made.exists():
            recipe = {
                "name": name,
                "seed": seed,
                "student": {"model": str(shape), "init": "random"} if shape.exists() else student,
                "strategy": strategy,
                "curriculum": curriculum,
                "endpoints": {"teacher": {"model": str(teacher)}} if teacher else {},
                "data": {**self._data(), "max_length_tokens": ROW_TOKENS},
                "train": {"steps": 4 if self.smoke else steps, "batch_rows": 4 if self.smoke else 16, "layout": "single", "lr": 4e-3},
                "evaluate": {"every_steps": 2 if self.smoke else 25},
            }
            runs.distill(recipe, cluster={"storage": str(self.folder / "runs")}, display=self.display)
        return made

    def _data(self) -> dict[str, Any]:
        splits = {split: {domain: str(self.folder / f"{domain}-{split}.jsonl") for domain in DOMAINS} for split in ("train", "held_out")}
        return {**splits, "held_out_rows": len(DOMAINS) * self._rows("held_out", DOMAINS[0])}

    def _rows(self, split: str, domain: str) -> int:
        return (32 if split == "train" else 4) if self.smoke else (ROWS[domain] if split == "train" else HELD_OUT_ROWS)

    def _prepare(self) -> None:
        """Rows of equal length, a tokenizer of both domains, and the shapes."""
        kept = {(domain, split): list(islice(texts(domain, split), 40 if self.smoke else 20_000)) for domain in DOMAINS for split in SPLITS}
        learnt = [text for domain in DOMAINS for text in kept[domain, "train"][:2_000]]
        tokenizer = quickstart.train_tokenizer(iter(learnt), VOCABULARY)
        for (domain, split), found in kept.items():
            ids = np.concatenate([np.asarray(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for text in found])
            count = self._rows(split, domain)
            rows = ids[: len(ids) // ROW_TOKENS * ROW_TOKENS].reshape(-1, ROW_TOKENS)[:count]
            lines = "".join(json.dumps({"tokens": row}) + "\n" for row in rows.tolist())
            (self.folder / f"{domain}-{split}.jsonl").write_text(lines, encoding="utf-8")
        for name, shape in (("teacher", quickstart.TEACHER), ("student", quickstart.STUDENT)):
            quickstart.write_shape(self.folder / "shapes" / name, tokenizer, TINY if self.smoke else shape, VOCABULARY)


SPLITS: tuple[arithmetic.Split, ...] = ("train", "held_out")


def texts(domain: str, split: arithmetic.Split) -> Iterator[str]:
    """Texts of a split; no module and no sum is in both."""
    if domain == "sums":
        yield from (row["prompt"] + row["completion"] for row in (problem.row for problem in arithmetic.problems(split)))
    else:
        yield from (text for name, text in quickstart.sources() if quickstart.held_out(name) == (split == "held_out"))


def gaps(folder: Path) -> dict[str, float]:
    """Cross-entropy above the teacher's on each domain's held-out rows at the end of a run, and tokens that it read."""
    lines = [json.loads(line)["values"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [values for values in lines if "eval/cross_entropy" in values][-1]
    found = {d: last[f"eval/cross_entropy/{d}"] - last[f"eval/teacher_cross_entropy/teacher/{d}"] for d in DOMAINS}
    return {**found, "tokens": sum(values["tokens"] for values in lines if "tokens" in values)}


def mean_gap(of_seeds: Sequence[Mapping[str, float]]) -> float:
    """Over domains and seeds."""
    return float(np.mean([[found[domain] for domain in DOMAINS] for found in of_seeds]))
