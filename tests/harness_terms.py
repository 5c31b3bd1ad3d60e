"""Trains a student on five terms of five kinds of signal under every layout: `python -m tests.harness_terms FOLDER RANK WORLD`.

The processes are those of `harness_layouts`, and so is what they write.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from orchestrator.config import RunConfig
from orchestrator.layouts import Layout
from orchestrator.teachers import Teachers
from orchestrator.train import Networks, train_step
from orchestrator.wishes import Wish
from strategies.core import Columns, Progress, Strategy
from strategies.head import Head
from strategies.terms import Terms
from tests import harness_layouts as plain
from tests.harness_layouts import ALONE, BOTH, CPU, PAIR, STEPS, VOCABULARY, Case

DRAWS, WIDTH = 8, 6
BETA, SMOOTHING, DISCOUNT = 0.3, 0.1, 0.9
WEIGHTS = {"jsd": 0.5, "drawn": 0.2, "ce": 0.1, "tv": 0.3, "to-go": 0.005}
TEACHER = np.random.default_rng(1).normal(size=(2, VOCABULARY, WIDTH)).astype(np.float32) * 1.2
"""The teacher's hidden state after every token, and its output head."""
CASES = (
    Case("single", "single", (ALONE,)),
    Case("single_small_micros", "single", (ALONE,), micro_batch_tokens=40),
    Case("single_one_micro", "single", (ALONE,), micro_batch_tokens=4000),
    Case("single_packed", "single", (ALONE,), batching="packed"),
    Case("ddp", "ddp", BOTH),
    Case("fsdp2", "fsdp2", BOTH),
    Case("zero2", "deepspeed", stage=2),
    Case("zero3", "deepspeed", BOTH, 3),
    Case("fsdp2_small_micros", "fsdp2", micro_batch_tokens=40),
    Case("zero3_small_micros", "deepspeed", stage=3, micro_batch_tokens=40),
    Case("fsdp2_untied", "fsdp2", tied=False),
    Case("zero3_untied", "deepspeed", stage=3, tied=False),
    Case("ddp_lora", "ddp", lora=True),
    Case("fsdp2_lora", "fsdp2", lora=True),
    Case("zero3_lora", "deepspeed", stage=3, lora=True),
    Case("ddp_bf16", "ddp", precision="bfloat16"),
    Case("fsdp2_bf16", "fsdp2", precision="bfloat16"),
    Case("zero3_bf16", "deepspeed", stage=3, precision="bfloat16"),
)


def strategy() -> Strategy:
    takes = {"far": "hidden", "drawn": {"type": "sampled", "draws": DRAWS}, "whole": "dense", "own": "per-token"}
    objectives = {
        "jsd": ({"type": "jsd", "beta": BETA}, "far"),
        "drawn": ("forward-kl", "drawn"),
        "ce": ({"type": "cross-entropy", "smoothing": SMOOTHING}, None),
        "tv": ("total-variation", "whole"),
        "to-go": ({"type": "reverse-kl-reward-to-go", "discount": DISCOUNT}, "own"),
    }
    terms = [{"name": n, "objective": o, "signal": s, "weight": WEIGHTS[n]} for n, (o, s) in objectives.items()]
    return Terms.model_validate({"signals": {n: {"endpoint": "teacher", "take": t} for n, t in takes.items()}, "terms": terms}).build()


def bundle(step: int, part: int) -> Columns:
    """That of the plain harness, without the step that is not finite, with another teacher and weights of another term."""
    columns = {name: values for name, values in plain.bundle(step, part).items() if not name.startswith("teacher/")}
    random = np.random.default_rng((step, part, 2))
    places = np.flatnonzero(columns["loss_mask"])
    states, labels = TEACHER[0][columns["tokens"][places - 1]], columns["tokens"][places]
    logprobs = torch.from_numpy(states @ TEACHER[1].T).log_softmax(-1).numpy()
    ids = np.asarray([random.choice(VOCABULARY, DRAWS, p=_shares(row)) for row in logprobs]).reshape(-1, DRAWS)
    weights = random.uniform(0, 2, len(places)) * (random.random(len(places)) < 0.6)
    return {
        **columns,
        "far/hidden": states.ravel(),
        "drawn/ids": ids.astype(np.int32).ravel(),
        "drawn/logprobs": np.take_along_axis(logprobs, ids.astype(np.int64), -1).ravel(),
        "drawn/weights": np.full(ids.size, 1 / DRAWS, np.float32),
        "whole/dense": logprobs.ravel(),
        "own/logprob": np.take_along_axis(logprobs, labels[:, None].astype(np.int64), -1).ravel(),
        "weights/ce": np.nan_to_num(columns["weights/ce"], posinf=1.0),
        "weights/jsd": weights.astype(np.float32),
    }


def _shares(logprobs: np.ndarray) -> np.ndarray:
    shares = np.exp(logprobs.astype(np.float64))
    return np.asarray(shares / shares.sum())


def whole_step(step: int) -> Columns:
    """All rows of a step in one bundle."""
    parts = [bundle(step, part) for part in range(PAIR)]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


class Side(plain.Side):
    """One process of the pair, or the one alone, on the terms."""

    def _step(self, run: RunConfig, players: Mapping[str, Layout], step: int) -> dict[str, float]:
        columns = whole_step(step) if self.world == ALONE else bundle(step, self.rank)
        what = strategy()
        teachers = Teachers(what.signals, {"teacher": Head(torch.from_numpy(TEACHER[1]))})
        return train_step(what, Networks(players, teachers, CPU), [columns], Progress(step, STEPS), run, Wish.NOTHING)[1]


if __name__ == "__main__":
    plain.main(Side(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), CASES, sys.argv[4:])
