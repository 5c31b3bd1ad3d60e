"""How often a teacher reads the data when several students learn from it: tokens it was sent over tokens in the data.

A server counts what it is sent, so nothing of the product's own books is believed. One store is filled, then four students of
different seeds, learning rates and temperatures are trained from it for two epochs each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cluster.engines.fake import FakeEngine
from cluster.engines.fake_server import FakeServer
from orchestrator.display import Display
from orchestrator.generate import generate
from orchestrator.rows import Rows
from orchestrator.run import distill
from tests.benchmarks import BENCHMARKS, material
from tests.benchmarks.figure import Figure, Settings, machine

NAME = "teacher-tokens"
STUDENTS, EPOCHS, ROW_TOKENS, TOP_K = 4, 2, 64, 8


def measure(settings: Settings) -> Figure:
    """The ratio; sizes play no part, so models are tiny."""
    os.environ.pop("RAY_ADDRESS", None)
    texts = material.standard_library(settings.folder / "material", smoke=True)
    cluster = {"storage": str(settings.folder / "runs")}
    students = 1 if settings.smoke else STUDENTS
    with FakeServer(FakeEngine(material.quickstart.VOCABULARY)) as server:
        content = _recipe(texts, server.url, max_rows=1)
        (kept,) = generate(content, cluster=cluster, display=Display()).signals
        for seed in range(students):
            changes = [f"seed={seed}", f"name=student{seed}", f"train.lr={10.0 ** -(2 + seed % 2)}", f"strategy.temperature={1 + seed}"]
            distill(content, changes, cluster)
        sent = [tuple(request["prompt"]) for request in server.requests]
    rows = _rows(settings.folder / "runs" / "data")
    scored = sum(len(prompt) for prompt in sent if prompt in rows)
    return Figure(
        name=NAME,
        value=scored / sum(len(row) * times for row, times in rows.items()),
        unit="tokens over tokens",
        against="the tokens of the prepared rows, held-out ones included",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "students": students,
            "epochs": EPOCHS,
            "tokens_trained": students * EPOCHS * kept.loss_tokens,
            "tokens_sent": sum(map(len, sent)),
            "requests": len(sent),
        },
    )


def _recipe(texts: material.Material, url: str, max_rows: int) -> dict[str, Any]:
    endpoint = {"engine": "openai", "base_url": url, "model": "fake", "vocabulary": material.quickstart.VOCABULARY}
    return {
        "student": {"model": str(texts.student)},
        "strategy": {"type": "logits", "top_k": TOP_K},
        "endpoints": {"teacher": endpoint},
        "data": {"train": str(texts.data), "held_out_rows": 8, "max_length_tokens": ROW_TOKENS, "max_rows": max_rows},
        "train": {"epochs": EPOCHS, "batch_rows": 16, "layout": "single"},
    }


def _rows(cache: Path) -> dict[tuple[int, ...], int]:
    """Every prepared row and how often it is there."""
    import numpy as np

    (folder,) = cache.glob("data-*")
    found: dict[tuple[int, ...], int] = {}
    for split in ("train", "held_out"):
        rows = Rows(str(folder), split)  # type: ignore[arg-type]
        for i in range(len(rows)):
            row = tuple(rows.read(np.asarray([i]))["tokens"].tolist())
            found[row] = found.get(row, 0) + 1
    return found
