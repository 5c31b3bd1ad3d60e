"""A whole on-policy training in one process and without Ray: the student writes, is scored or judged, and learns, step by step.

`make_toy` saves a student that knows nothing, a teacher whose next token depends on the one before, and a tokenizer of whole words.
`Loop` builds a strategy from its recipe, equips it as the door does, answers its stages with real engines, and takes real training
steps. `Loop.divergence` and `Loop.reward` are measured on texts that the student of the moment writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import TransformersEndpoint
from cluster.endpoints import make_engine
from orchestrator.config import load_job
from orchestrator.controls import Controls
from orchestrator.players import load_players
from orchestrator.published import published_weights
from orchestrator.rollouts import equipped
from orchestrator.teachers import Teachers
from orchestrator.train import Networks, train_step
from orchestrator.versions import VERSION, Freshness
from orchestrator.wishes import Wish
from strategies.core import Columns, Progress, Sampling, ScoreRequest, Verifier
from strategies.objectives.divergence import reverse_kl
from strategies.stages.rollout import STUDENT, rollouts
from tests.tiny import tiny_model

VOCABULARY, WIDTH, END = 24, 32, 0
PROMPT, TEXT = 3, 8
"""Tokens of a prompt, and most tokens of a text."""
ROWS, MEASURED = 64, 128
"""Rows of the data, and texts that a measurement looks at."""
SURENESS = 0.25
"""Spread of the teacher's output head."""
CPU = torch.device("cpu")
SAME: Mapping[str, Any] = {}


def make_toy(folder: Path, teacher_width: int = WIDTH, teacher_layers: int = 1) -> Path:
    """Saved models `student` and `teacher`, each with the tokenizer; at first they are some 1.1 nats per token apart."""
    for name, seed, width, layers in (("student", 0, WIDTH, 1), ("teacher", 1, teacher_width, teacher_layers)):
        model = tiny_model(folder / name, VOCABULARY, width, layers=layers, heads=2, max_length_tokens=32, tied=False, seed=seed)
        if name == "teacher":
            torch.nn.init.normal_(model.lm_head.weight, std=SURENESS, generator=torch.Generator().manual_seed(seed))
            model.save_pretrained(folder / name)
        words = {"<end>": END} | {f"w{i}": i for i in range(1, VOCABULARY)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<end>")), eos_token="<end>")
        tokenizer.save_pretrained(str(folder / name))
    return folder


class Says:
    """A verifier: 1 for a text that has the token `wanted`, else 0."""

    def __init__(self, wanted: int):
        self.wanted = wanted

    def judge(self, columns: Columns) -> Columns:
        """See `strategies.core.Verifier`."""
        hits = (columns["tokens"] == self.wanted) & columns["loss_mask"].astype(bool)
        rows = np.split(hits, np.cumsum(columns["lengths"].astype(np.int64))[:-1])
        none = np.zeros(1, dtype=np.int64)
        rewards = np.asarray([row.any() for row in rows], dtype=np.float32)
        return {"reward": rewards, "judged": np.ones(len(rows), dtype=np.uint8), "failed": none, "unjudgeable": none}


class Scorer(Protocol):
    """An endpoint of the toy."""

    def score(self, columns: Columns, request: ScoreRequest) -> Columns: ...
    def write(self, columns: Columns, sampling: Sampling) -> Columns: ...


class Loop:
    """One training of the toy in `folder`.

    `strategy` is that of a recipe, without `max_new_tokens` where it has its own. `train` adds to or replaces the recipe's settings.
    Endpoints are `student`, `teacher`, `base`, which is the student as it began, and those given, such as `verifier=Says(5)`; a frozen
    player may be `teacher` or `base`.
    """

    def __init__(self, folder: Path, strategy: Mapping[str, Any], train: Mapping[str, Any] = SAME, **endpoints: Verifier | Scorer):
        where = {"teacher": {"model": str(folder / "teacher")}, "base": {"model": str(folder / "student")}}
        recipe = {
            "student": str(folder / "student"),
            "strategy": {"max_new_tokens": TEXT, **strategy},
            "endpoints": where,
            "data": {"train": "none", "max_length_tokens": PROMPT + TEXT},
            "train": {"steps": 30, "batch_rows": 48, "lr": 1e-2, "warmup_steps": 2, "layout": "single", **train},
        }
        job = load_job(recipe)
        self.run, self.steps = job.run, job.run.train.steps or 0
        self.strategy = equipped(job, self.run.strategy.build(), AutoTokenizer.from_pretrained(folder / "student"))
        (stage,) = rollouts(self.strategy.stages)
        self.due = Freshness(stage.staleness, False, None).due
        configs = {name: TransformersEndpoint(**settings, dtype="float32") for name, settings in where.items()}
        student = TransformersEndpoint(model=str(folder / "student"), dtype="float32", follows_student=True)
        engines = {name: make_engine(config, VOCABULARY, threads=1) for name, config in {**configs, STUDENT: student}.items()}
        self.endpoints: dict[str, Any] = {**engines, **endpoints}
        teachers = Teachers.load(self.strategy.players, self.strategy.signals, configs, VOCABULARY, False, CPU)
        self.networks = Networks(load_players(self.run, self.strategy.players, CPU, self.strategy.updates, teachers.shown), teachers, CPU)
        self.controls = Controls(self.strategy.controllers, {}, 1)
        self.versions = [self._weights()]
        self.data = self._data()

    def step(self) -> tuple[dict[str, float], Columns]:
        """The next step: its metrics, and the bundle that it was taken on."""
        done = len(self.versions) - 1
        columns = self._bundle(done + 1)
        for stage in self.strategy.stages:
            columns = stage(columns, self.endpoints[stage.endpoint] if stage.endpoint else None)
        torch.manual_seed(done)
        progress = Progress(done, self.steps, self.controls.values)
        _, metrics = train_step(self.strategy, self.networks, [columns], progress, self.run, Wish.NOTHING)
        self.controls.after_step(metrics, progress)
        self.versions.append(self._weights())
        return metrics, columns

    def train(self) -> list[dict[str, float]]:
        """All steps; their metrics."""
        return [self.step()[0] for _ in range(self.steps)]

    def divergence(self) -> float:
        """KL(q || p) of whole next-token distributions, in nats per token, over texts that the student writes now."""
        columns = self._written(len(self.versions) - 1)
        log_q, log_p = (self._log_probabilities(name, columns) for name in (STUDENT, "teacher"))
        return float(reverse_kl(log_q, log_p).mean())

    def reward(self, verifier: str = "verifier") -> float:
        """Mean reward of texts that the student writes now."""
        columns = self._written(len(self.versions) - 1)
        none = {"reference": np.zeros(0, np.int32), "reference_lengths": np.zeros(len(columns["lengths"]), np.int32)}
        return float(self.endpoints[verifier].judge({**columns, **none})["reward"].mean())

    def _weights(self) -> dict[str, torch.Tensor]:
        student = next(iter(self.networks.players.values()))
        return {name: value.clone() for name, value in published_weights(student, None).items()}

    def _data(self) -> Columns:
        """Prompts of random tokens, and what the teacher writes after them."""
        tokens = np.random.default_rng(0).integers(1, VOCABULARY, (ROWS, PROMPT)).astype(np.int32)
        return _continued(tokens, self.endpoints["teacher"], seed=0)

    def _bundle(self, step: int) -> Columns:
        """Rows of the data with control columns, as the reader hands them to the first stage."""
        version = self.due(step)
        self.endpoints[STUDENT].publish(self.versions[version], version)
        chosen = np.random.default_rng((1, step)).integers(0, ROWS, self.run.train.batch_rows)
        control = {"step": step, "steps": self.steps, "bundle": step, "attempt": 1, "rows_total": len(chosen), VERSION: version}
        return _rows(self.data, chosen) | {name: np.asarray([value], dtype=np.int64) for name, value in control.items()}

    def _written(self, version: int) -> Columns:
        """Texts of a version of the student after prompts of their own."""
        self.endpoints[STUDENT].publish(self.versions[version], version)
        tokens = np.random.default_rng(2).integers(1, VOCABULARY, (MEASURED, PROMPT)).astype(np.int32)
        return _continued(tokens, self.endpoints[STUDENT], seed=3)

    def _log_probabilities(self, endpoint: str, columns: Columns) -> torch.Tensor:
        dense = self.endpoints[endpoint].score(columns, ScoreRequest("dense"))["dense"]
        return torch.from_numpy(dense.reshape(-1, VOCABULARY)).double()


def _continued(prompts: np.ndarray, author: Scorer, seed: int) -> Columns:
    """Rows of `prompts` `(R, P)` and what `author` draws after them."""
    sizes, ids = np.full(len(prompts), prompts.shape[1], dtype=np.int32), np.arange(len(prompts), dtype=np.int64)
    sampling = Sampling(temperature=1.0, max_new_tokens=TEXT, seed=seed, stop=(END,))
    written = author.write({"tokens": prompts.ravel(), "lengths": sizes, "row_id": ids}, sampling)
    texts = np.split(written["tokens"], np.cumsum(written["lengths"])[:-1])
    rows = [np.concatenate(pair) for pair in zip(prompts, texts, strict=True)]
    masks = [np.arange(len(row)) >= prompts.shape[1] for row in rows]
    return {
        "tokens": np.concatenate(rows).astype(np.int32),
        "loss_mask": np.concatenate(masks).astype(np.uint8),
        "lengths": (sizes + written["lengths"]).astype(np.int32),
        "row_id": ids,
    }


def _rows(columns: Columns, chosen: np.ndarray) -> Columns:
    """The rows numbered `chosen`."""
    ends = np.cumsum(columns["lengths"].astype(np.int64))
    parts = [np.arange(ends[i] - columns["lengths"][i], ends[i]) for i in chosen]
    at = np.concatenate(parts)
    return {name: columns[name][at if name in ("tokens", "loss_mask") else chosen] for name in columns}
