"""What a loop that is not the product is given: models, hyper-parameters, and the product's own rows step by step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.config import load_job
from orchestrator.data import prepare
from orchestrator.models import load_tokenizer
from orchestrator.order import Order
from orchestrator.rows import Rows
from tests.benchmarks.product import ROOT, TAIL_LINES, environment
from tests.benchmarks.window import Trace


@dataclass(frozen=True)
class LoopSpec:
    """One run of a loop."""

    student: str
    teacher: str
    rows: str
    """Prepared data, as `prepare` made it."""
    steps: int
    batch_rows: int
    threads: int
    seed: int = 0
    top_k: int = 64
    kd_weight: float = 0.9
    ce_weight: float = 0.1
    lr: float = 4e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    gradient_checkpointing: bool = False
    """Only TRL's loop reads it."""

    @classmethod
    def load(cls, path: Path) -> LoopSpec:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Batch:
    """The rows of one step."""

    rows: list[list[int]]
    masks: list[list[int]]
    """1 where a token is learnt."""

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids and mask `(B, L)`, padded on the right."""
        width = max(len(row) for row in self.rows)
        ids, mask = torch.zeros(len(self.rows), width, dtype=torch.int64), torch.zeros(len(self.rows), width)
        for i, (row, kept) in enumerate(zip(self.rows, self.masks, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(kept)] = torch.tensor(kept, dtype=torch.float32)
        return ids, mask


def prepare_rows(recipe: dict[str, object], folder: Path) -> str:
    """Folder of the rows that the product makes of this recipe's data."""
    run = load_job(recipe).run
    return prepare(run.data, load_tokenizer(run.student), run.data.split_seed, folder).folder


def batches(spec: LoopSpec) -> Iterator[Batch]:
    """The rows of every step, as the product orders them."""
    rows = Rows(spec.rows, "train")
    order = Order(folder=spec.rows, seed=spec.seed, steps=spec.steps, bundles_per_step=1, batch_rows=spec.batch_rows)
    for step in range(1, spec.steps + 1):
        columns = rows.read(order.step_rows(step))
        cuts = np.cumsum(columns["lengths"])[:-1]
        parts = [[part.tolist() for part in np.split(columns[name], cuts)] for name in ("tokens", "loss_mask")]
        yield Batch(*parts)


def run_loop(module: str, spec: LoopSpec, folder: Path) -> Trace:
    """Runs `module` as a process with this spec and reads its trace. `SystemExit` when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered = folder / "spec.json", folder / "trace.json"
    asked.write_text(json.dumps(asdict(spec)), encoding="utf-8")
    command = [sys.executable, "-m", module, str(asked), str(answered)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-TAIL_LINES:]))
    return Trace.load(answered)
