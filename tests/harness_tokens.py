"""A training across two tokenizers in one process and without Ray: a student of bytes, and a teacher that reads pieces of words.

The language is chains of a few words. `make_language` saves a teacher that has learnt it and a student that knows nothing; `Lesson` builds
a strategy from its recipe, tells its stages both tokenizers as the door does, and takes real training steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cluster.config import TransformersEndpoint
from cluster.endpoints import make_engine
from orchestrator.alignment import told, units
from orchestrator.checks.networks import Cast
from orchestrator.config import load_job
from orchestrator.players import load_players
from orchestrator.published import published_weights
from orchestrator.rollouts import equipped
from orchestrator.sketch import student_network, teacher_network
from orchestrator.teachers import Teachers
from orchestrator.train import Networks, train_step
from orchestrator.versions import VERSION
from orchestrator.wishes import Wish
from strategies.core import Columns, Progress, ScoreRequest
from strategies.stages.align import foreign
from strategies.stages.rollout import STUDENT
from tests.tiny import tiny_model
from tests.tokenizers import bundle, bytes_alone

WORDS = ("abab", "cdé", "efgh", "iji", "klmn", "ouo")
ROWS, ROW_BYTES, BATCH = 64, 48, 16
CPU = torch.device("cpu")


def make_language(folder: Path) -> Path:
    """Saved models `student` and `teacher` in `folder`, each beside its own tokenizer."""
    texts = [text(seed) for seed in range(200)]
    theirs = _pieces(texts)
    for name, tokenizer, seed in (("student", bytes_alone(), 0), ("teacher", theirs, 1)):
        tiny_model(folder / name, vocab_size=len(tokenizer), width=48, layers=2, heads=4, max_length_tokens=64, seed=seed)
        tokenizer.save_pretrained(str(folder / name))
    _learn(folder, texts)
    return folder


def text(seed: int) -> str:
    """Words, each followed by one of two that the word before leaves open."""
    draw, found = np.random.default_rng(seed), [seed % len(WORDS)]
    while sum(len(WORDS[w].encode()) + 1 for w in found) < ROW_BYTES:
        found.append((found[-1] + int(draw.choice([1, 2], p=[0.8, 0.2]))) % len(WORDS))
    return " ".join(WORDS[w] for w in found)


class Lesson:
    """One training of `folder`'s student by its teacher. `strategy` is that of a recipe; `train` adds to or replaces its settings."""

    def __init__(self, folder: Path, strategy: Mapping[str, Any], train: Mapping[str, Any] | None = None, student: str = "student"):
        (folder / "rows.jsonl").write_text('{"text": "its rows are made below; this says that they are texts"}\n')
        recipe = {
            "student": str(folder / student),
            "strategy": dict(strategy),
            "endpoints": {"teacher": {"model": str(folder / "teacher")}},
            "data": {"train": str(folder / "rows.jsonl"), "max_length_tokens": 64},
            "train": {"steps": 40, "batch_rows": BATCH, "lr": 1e-2, "warmup_steps": 2, "layout": "single", **(train or {})},
        }
        job = load_job(recipe)
        self.run, self.steps = job.run, job.run.train.steps or 0
        ours, theirs = (AutoTokenizer.from_pretrained(folder / name) for name in (student, "teacher"))
        built = self.run.strategy.build()
        network = teacher_network("teacher", str(folder / "teacher"), None, False, "float32")
        asked = foreign(built.stages)
        people = Cast(
            student_network(self.run.student), ours, {"teacher": network}, {"teacher": theirs}, len(ours), dict.fromkeys(asked, 0)
        )
        self.strategy = told(job, equipped(job, built, ours), people)
        teacher = TransformersEndpoint(model=str(folder / "teacher"), dtype="float32")
        writer = TransformersEndpoint(model=str(folder / student), dtype="float32", follows_student=True)
        self.endpoints: dict[str, Any] = {"teacher": make_engine(teacher, threads=1), STUDENT: make_engine(writer, threads=1)}
        teachers = Teachers.load(self.strategy.players, self.strategy.signals, {"teacher": teacher}, None, False, CPU, units(self.strategy))
        self.networks = Networks(load_players(self.run, self.strategy.players, CPU, self.strategy.updates, teachers.shown), teachers, CPU)
        self.rows = [[*ours(text(1000 + i))["input_ids"], ours.eos_token_id] for i in range(ROWS)]
        self.held_out = bundle([[*ours(text(5000 + i))["input_ids"], ours.eos_token_id] for i in range(ROWS)])
        self.done = 0

    def step(self) -> tuple[dict[str, float], Columns]:
        """The next step: its metrics, and the bundle that it was taken on."""
        self._publish()
        chosen = np.random.default_rng((1, self.done)).integers(0, ROWS, BATCH)
        control = {"step": self.done + 1, "steps": self.steps, "bundle": 0, "attempt": 1, "rows_total": BATCH, VERSION: self.done}
        columns = bundle([self.rows[i] for i in chosen]) | {n: np.asarray([v], dtype=np.int64) for n, v in control.items()}
        for stage in self.strategy.stages:
            columns = stage(columns, self.endpoints[stage.endpoint] if stage.endpoint else None)
        _, metrics = train_step(self.strategy, self.networks, [columns], Progress(self.done, self.steps), self.run, Wish.NOTHING)
        self.done += 1
        return metrics, columns

    def train(self) -> list[dict[str, float]]:
        """All steps; their metrics."""
        return [self.step()[0] for _ in range(self.steps)]

    def cross_entropy(self) -> float:
        """Of held-out text, in nats per token of the student: a byte."""
        self._publish()
        return float(-self.endpoints[STUDENT].score(self.held_out, ScoreRequest("per-token"))["logprob"].mean())

    def save(self, folder: Path) -> None:
        """The student as it is now, with its tokenizer, so that another lesson can go on from it."""
        self._publish()
        self.endpoints[STUDENT].model.save_pretrained(str(folder))
        bytes_alone().save_pretrained(str(folder))

    def _publish(self) -> None:
        student = next(iter(self.networks.players.values()))
        self.endpoints[STUDENT].publish(published_weights(student, None), self.done)


def _pieces(texts: list[str]) -> PreTrainedTokenizerBase:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=275, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def _learn(folder: Path, texts: list[str]) -> None:
    """Trains the teacher on the language by cross-entropy."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder / "teacher"), AutoModelForCausalLM.from_pretrained(folder / "teacher")
    rows = [torch.tensor([*tokenizer(t)["input_ids"], tokenizer.eos_token_id]) for t in texts]
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), np.random.default_rng(0)
    for _ in range(60):
        chosen = [rows[i] for i in draw.integers(0, len(rows), BATCH)]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder / "teacher"))
