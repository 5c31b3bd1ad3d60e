"""How fast the Align stage reads rows in a teacher's tokens, against how fast the quickstart's student trains: tokens/s of one thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from jobs import quickstart
from orchestrator.foreign import foreign_reader
from strategies.core import Columns
from strategies.stages.align import Align
from strategies.stages.rollout import LONGEST_ROW
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.material import standard_library

NAME = "align-throughput"
BATCH_ROWS, ROW_TOKENS = 16, 128
OTHER_VOCABULARY = 8192
"""Of the teacher, where the student is the quickstart's."""


def measure(settings: Settings) -> Figure:
    """The slower of two stages, whose students have the quickstart's BPE and bytes, over training the student on the former's rows."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    material = standard_library(settings.folder / "material", settings.smoke)
    texts = [text for _, text in quickstart.sources()][: 8 if settings.smoke else None]
    ours, theirs = (quickstart.train_tokenizer(iter(texts), v) for v in (quickstart.VOCABULARY, OTHER_VOCABULARY))
    steps = 3 if settings.smoke else 60
    students = {"bpe": ours, "bytes": quickstart.byte_tokenizer()}
    bundles = {name: _bundles(tokenizer, texts, steps) for name, tokenizer in students.items()}
    stages = {n: Align("teacher", foreign_reader(t, theirs, "teacher", LONGEST_ROW), "teacher") for n, t in students.items()}
    found: dict[str, list[float]] = {}
    for _ in range(settings.rounds):
        for name, stage in stages.items():
            found.setdefault(f"align, {name}", []).append(_speed(lambda b, s=stage: s(b, None), bundles[name]))  # type: ignore[misc]
        found.setdefault("training", []).append(_speed(_trainer(material.student), bundles["bpe"]))
    speeds = {name: median(values) for name, values in found.items()}
    return Figure(
        name=NAME,
        value=min(speeds[f"align, {name}"] for name in students) / speeds["training"],
        unit="tokens/s over tokens/s",
        against="forward, backward and AdamW of the quickstart's student on cross-entropy in a bare loop, in one thread as well",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "median_tokens_per_second": speeds, "rounds": found, "steps": steps},
    )


def _bundles(tokenizer: PreTrainedTokenizerBase, texts: list[str], count: int) -> list[Columns]:
    """Bundles of one step each."""
    ids = np.concatenate([tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts])
    size = BATCH_ROWS * ROW_TOKENS
    mask = np.tile(np.arange(ROW_TOKENS) > 0, BATCH_ROWS).astype(np.uint8)
    lengths = np.full(BATCH_ROWS, ROW_TOKENS, np.int32)
    starts = [(i * size) % (len(ids) - size) for i in range(count)]
    return [{"tokens": ids[s : s + size].astype(np.int32), "lengths": lengths, "loss_mask": mask} for s in starts]


def _speed(work: Callable[[Columns], object], bundles: list[Columns]) -> float:
    """Tokens of the student's that are worked on in a second; the first bundle warms up."""
    work(bundles[0])
    began = time.perf_counter()
    for bundle in bundles[1:]:
        work(bundle)
    return sum(len(b["tokens"]) for b in bundles[1:]) / (time.perf_counter() - began)


def _trainer(student: Path) -> Callable[[Columns], object]:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(columns: Columns) -> None:
        ids = torch.from_numpy(columns["tokens"].astype(np.int64).reshape(BATCH_ROWS, ROW_TOKENS))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
