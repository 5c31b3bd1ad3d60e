"""TRL's side of the on-policy step: its DistillationTrainer. `python -m tests.benchmarks.trl_writing_loop SPEC TRACE`.

Prompts come in the product's order, as the text that makes the same token ids again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tests.benchmarks.loop import LoopSpec, batches
from tests.benchmarks.trl_arguments import shared_arguments
from tests.benchmarks.window import Trace


@dataclass(frozen=True)
class WritingSpec(LoopSpec):
    """A run in which the student writes."""

    max_new_tokens: int = 256
    beta: float = 1.0
    """1 is reverse KL."""


class Clock(TrainerCallback):
    """Notes when each step ended, its loss, and the mean length of its texts."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self.lengths: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.time())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.lengths.append(logs["completions/mean_length"])


def train(spec: WritingSpec, folder: str) -> Trace:
    """Trains for `spec.steps` steps; the tokens of a step are those that the student wrote."""
    torch.set_num_threads(spec.threads)
    tokenizer = AutoTokenizer.from_pretrained(spec.student)
    clock = Clock()
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec.student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(spec.teacher, dtype=torch.float32),
        args=arguments(spec, folder),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts(spec, tokenizer)]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    written = [round(length * spec.batch_rows) for length in clock.lengths]
    return Trace(tuple(clock.times), tuple(written), tuple(clock.losses))


def prompts(spec: LoopSpec, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts of all steps, as text. `SystemExit` for one whose text makes other ids."""
    found = []
    for batch in batches(spec):
        for ids, mask in zip(batch.rows, batch.masks, strict=True):
            prompt = ids[: mask.index(1)]
            found.append(str(tokenizer.decode(prompt)))
            if tokenizer(found[-1])["input_ids"] != prompt:
                raise SystemExit(f"the prompt {found[-1][:40]!r}: its text makes other token ids")
    return found


def arguments(spec: WritingSpec, folder: str) -> DistillationConfig:
    """TRL's defaults but for what both sides share, on prompts in their order. Logged every step, as the product does."""
    return DistillationConfig(
        **shared_arguments(spec, folder),
        beta=spec.beta,
        temperature=1.0,
        max_completion_length=spec.max_new_tokens,
        shuffle_dataset=False,
        logging_steps=1,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        train(WritingSpec.load(Path(sys.argv[1])), temporary).save(Path(sys.argv[2]))
