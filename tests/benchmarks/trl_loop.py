"""TRL's side: its GKDTrainer, never asking the student to write. `python -m tests.benchmarks.trl_loop SPEC TRACE`.

Rows come as token ids in the product's order, so TRL spends nothing on templates and tokenizing; its own collator pads.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from tests.benchmarks.loop import LoopSpec, batches
from tests.benchmarks.trl_arguments import shared_arguments
from tests.benchmarks.window import Trace


class Clock(TrainerCallback):
    """Notes when each step ended, and the losses that the trainer logs."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.time())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if logs and "loss" in logs else []


def train(spec: LoopSpec, folder: str) -> Trace:
    """Trains for `spec.steps` steps; only every tenth loss is known, as TRL logs it."""
    torch.set_num_threads(spec.threads)
    given = list(batches(spec))
    rows = [
        {"prompt": "", "input_ids": ids, "completion_mask": mask}
        for batch in given
        for ids, mask in zip(batch.rows, batch.masks, strict=True)
    ]
    clock = Clock()
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec.student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(spec.teacher, dtype=torch.float32),
        args=arguments(spec, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec.student),
        callbacks=[clock],
    )
    trainer.train()
    return Trace(tuple(clock.times), tuple(batch.tokens for batch in given), tuple(clock.losses))


def arguments(spec: LoopSpec, folder: str) -> GKDConfig:
    """TRL's defaults but for what both sides share, on the rows' own texts in their order."""
    return GKDConfig(**shared_arguments(spec, folder), lmbda=0.0, beta=0.0, seq_kd=False, train_sampling_strategy="sequential")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        train(LoopSpec.load(Path(sys.argv[1])), temporary).save(Path(sys.argv[2]))
