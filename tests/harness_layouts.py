"""Runs every layout's training steps in plain processes, without Ray: `python -m tests.harness_layouts FOLDER RANK WORLD [CASE...]`.

Two processes make a pair and a third runs alone; each writes what it measured to `FOLDER/<world>_<rank>.json`. Both sides save
checkpoints half-way, and then each goes on from the other's.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.train import Checkpoint

from orchestrator import checkpoint
from orchestrator.config import RunConfig, load_job
from orchestrator.layouts import Layout
from orchestrator.players import load_players
from orchestrator.teachers import Teachers
from orchestrator.train import Networks, train_step
from orchestrator.wishes import Wish
from strategies.core import Columns, Progress

STEPS, HALF, AFTER, POISONED = 50, 25, 12, 9
VOCABULARY, TOP_K, CLIP_NORM = 97, 5, 0.2
PAIR, ALONE = 2, 1
CPU = torch.device("cpu")
LIKES = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)) * 2
"""The teacher's logits of every next token by the token before."""


@dataclass(frozen=True)
class Case:
    """One layout of one student, at one or both world sizes."""

    name: str
    layout: str
    worlds: tuple[int, ...] = (PAIR,)
    stage: int = 0
    offload: bool = False
    tied: bool = True
    lora: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    batching: Literal["bucketed", "packed"] = "bucketed"
    micro_batch_tokens: int = 90
    steps: int = 14
    checkpoints: bool = False
    """Saves half-way and goes on from the other side's checkpoint."""

    def steps_at(self, world: int) -> int:
        """Steps from the start; the one alone makes only its half when the pair makes all."""
        return HALF if self.checkpoints and world == ALONE and PAIR in self.worlds else self.steps

    @property
    def reference(self) -> str:
        """Which independent curve this one must follow."""
        return "lora" if self.lora else "tied" if self.tied else "untied"


BOTH = (ALONE, PAIR)
CASES = (
    Case("single", "single", (ALONE,), steps=STEPS, checkpoints=True),
    Case("ddp", "ddp", BOTH, steps=STEPS, checkpoints=True),
    Case("fsdp2", "fsdp2", BOTH, steps=STEPS, checkpoints=True),
    Case("zero0", "deepspeed", BOTH, 0, steps=STEPS, checkpoints=True),
    Case("zero1", "deepspeed", BOTH, 1, steps=STEPS, checkpoints=True),
    Case("zero2", "deepspeed", BOTH, 2, steps=STEPS, checkpoints=True),
    Case("zero3", "deepspeed", BOTH, 3, steps=STEPS, checkpoints=True),
    Case("zero1_offload", "deepspeed", stage=1, offload=True),
    Case("zero2_offload", "deepspeed", BOTH, 2, offload=True),
    Case("zero3_offload", "deepspeed", BOTH, 3, offload=True),
    Case("ddp_untied", "ddp", tied=False),
    Case("fsdp2_untied", "fsdp2", tied=False),
    Case("zero3_untied", "deepspeed", stage=3, tied=False),
    Case("single_lora", "single", (ALONE,), lora=True),
    Case("ddp_lora", "ddp", lora=True),
    Case("fsdp2_lora", "fsdp2", lora=True),
    Case("zero2_lora", "deepspeed", stage=2, lora=True),
    Case("zero3_lora", "deepspeed", stage=3, lora=True),
    Case("single_packed", "single", (ALONE,), batching="packed"),
    Case("single_recompute", "single", (ALONE,), recompute=True),
    Case("ddp_recompute", "ddp", recompute=True),
    Case("fsdp2_recompute", "fsdp2", recompute=True),
    Case("zero3_recompute", "deepspeed", stage=3, recompute=True),
    Case("single_bf16", "single", (ALONE,), precision="bfloat16"),
    Case("ddp_bf16", "ddp", precision="bfloat16"),
    Case("fsdp2_bf16", "fsdp2", precision="bfloat16"),
    Case("zero0_bf16", "deepspeed", stage=0, precision="bfloat16"),
    Case("zero1_bf16", "deepspeed", BOTH, 1, precision="bfloat16", steps=HALF, checkpoints=True),
    Case("zero2_bf16", "deepspeed", stage=2, precision="bfloat16"),
    Case("zero3_bf16", "deepspeed", BOTH, 3, precision="bfloat16", steps=HALF, checkpoints=True),
)


def run_config(models: Path, case: Case) -> RunConfig:
    """The recipe of a case. `eps` is far above the rounding of gradients that are zero but for rounding, which AdamW would
    otherwise turn into steps of full size."""
    train = {
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 5,
        "eps": 1e-5,
        "clip_norm": CLIP_NORM,
        "weight_decay": 0.1,
        "micro_batch_tokens": case.micro_batch_tokens,
        "batching": case.batching,
        "precision": case.precision,
        "gradient_checkpointing": case.recompute,
        "layout": {"type": case.layout, "zero_stage": case.stage, "offload_optimizer": case.offload},
    }
    student: dict[str, Any] = {"model": str(models / ("tied" if case.tied else "untied"))}
    if case.lora:
        student["lora"] = {"r": 4, "alpha": 8}
    recipe = {
        "student": student,
        "strategy": {"type": "logits", "top_k": TOP_K},
        "data": {"train": "none", "max_length_tokens": 48},
        "train": train,
        "endpoints": {"teacher": {"model": "none"}},
    }
    return load_job(recipe).run


def bundle(step: int, part: int) -> Columns:
    """Rows of one of the two parts of a step: part 1 has fewer and hardly predicted ones, and none at all every seventh step."""
    random = np.random.default_rng((step, part))
    lengths = random.integers(4, 40, size=6 if part == 0 else 3)
    mask = random.random(int(lengths.sum())) < (0.7 if part == 0 else 0.08)
    mask[np.cumsum(lengths) - lengths] = False
    if part == 1 and step % 7 == 0:
        mask[:] = False
    count = int(mask.sum())
    tokens = _chain(random, int(lengths.sum()))
    top = torch.from_numpy(LIKES[tokens[np.flatnonzero(mask) - 1]]).float().log_softmax(-1).topk(TOP_K, -1)
    weights = random.uniform(0.5, 2.0, size=count).astype(np.float32)
    if part == 1 and step == POISONED:
        weights[:1] = np.inf
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "loss_mask": mask.astype(np.uint8),
        "row_id": np.arange(len(lengths)),
        "teacher/ids": top.indices.numpy().astype(np.int32).ravel(),
        "teacher/logprobs": top.values.numpy().ravel(),
        "weights/ce": weights,
    }


def _chain(random: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Tokens of which most are what the teacher likes best after the one before, so that there is something to learn."""
    tokens = random.integers(0, VOCABULARY, size=count)
    for place in np.flatnonzero(random.random(count - 1) < 0.7) + 1:
        tokens[place] = LIKES[tokens[place - 1]].argmax()
    return tokens


def whole_step(step: int) -> Columns:
    """All rows of a step in one bundle."""
    parts = [bundle(step, part) for part in range(PAIR)]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


class Measures(Protocol):
    """What a process does with a case."""

    @property
    def folder(self) -> Path: ...
    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def measure(self, case: Case) -> dict[str, Any]: ...


def main(side: Measures, all_cases: Sequence[Case], only: Sequence[str] = ()) -> None:
    """One process: measures the cases of its world and writes what it found."""
    folder, rank, world = side.folder, side.rank, side.world
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(str(folder / f"store_{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    cases = [c for c in all_cases if world in c.worlds and (not only or c.name in only)]
    found = {case.name: side.measure(case) for case in cases}
    if isinstance(side, Side):
        for case in (c for c in cases if c.checkpoints):
            found[case.name] |= side.go_on(case)
    (folder / f"{world}_{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


@dataclass(frozen=True)
class Side:
    """One process of the pair, or the one alone."""

    folder: Path
    rank: int
    world: int

    def measure(self, case: Case) -> dict[str, Any]:
        """The curve from the first step, and what the rank holds."""
        print(f"{time.process_time():.1f} s: {case.name} at {self.world}", file=sys.stderr, flush=True)
        run, players = self._load(case)
        steps = []
        for step in range(case.steps_at(self.world)):
            steps.append(self._step(run, players, step))
            if case.checkpoints and step + 1 == HALF:
                self._save(case, players, HALF)
        student = players["student"]
        return {"steps": steps, "held": student.held_bytes(), "stored": stored_bytes(student), "whole": whole_bytes(self.folder, case)}

    def go_on(self, case: Case) -> dict[str, Any]:
        """`AFTER` steps more, from the checkpoint of the other side: of this one where it has no other."""
        print(f"{case.name} goes on at {self.world}", file=sys.stderr, flush=True)
        others = [w for w in case.worlds if w != self.world] or [self.world]
        source = merged(self.folder, case, others[0])
        run, players = self._load(case)
        position = checkpoint.restore(players, Checkpoint.from_directory(str(source)))
        return {"resumed": [self._step(run, players, step) for step in range(position.step, position.step + AFTER)]}

    def _load(self, case: Case) -> tuple[RunConfig, dict[str, Layout]]:
        run = run_config(self.folder, case)
        return run, load_players(run, run.strategy.build().players, CPU)

    def _save(self, case: Case, players: Mapping[str, Layout], step: int) -> None:
        part = checkpoint.save(players, checkpoint.Position(step, 1, {}), self.rank)
        to = part_of(self.folder, case, self.world, self.rank)
        shutil.move(part.path, to.with_suffix(".moving"))
        to.with_suffix(".moving").rename(to)

    def _step(self, run: RunConfig, players: Mapping[str, Layout], step: int) -> dict[str, float]:
        columns, strategy = whole_step(step) if self.world == ALONE else bundle(step, self.rank), run.strategy.build()
        _, metrics = train_step(
            strategy, Networks(players, Teachers(strategy.signals), CPU), [columns], Progress(step, STEPS), run, Wish.NOTHING
        )
        return metrics


def part_of(folder: Path, case: Case, world: int, rank: int) -> Path:
    return folder / f"{case.name}_{world}_{rank}"


def merged(folder: Path, case: Case, world: int) -> Path:
    """The checkpoint that all ranks of a side wrote, put into one folder as Ray Train does; waits until they have."""
    until = time.monotonic() + 240
    parts = [part_of(folder, case, world, rank) for rank in range(world)]
    while not all(p.exists() for p in parts):
        if time.monotonic() > until:
            raise TimeoutError(f"{case.name}: no checkpoint of the side with {world} processes")
        time.sleep(0.05)
    whole = Path(f"{parts[0]}_merged_{os.getpid()}")
    for part in parts:
        shutil.copytree(part, whole, dirs_exist_ok=True)
    return whole


def stored_bytes(layout: Layout) -> int:
    """Bytes of memory behind the student's weights on this rank, found without asking the layout."""
    storages = {s.data_ptr(): s.nbytes() for s in _storages(layout.module)}
    return sum(storages.values())


def _storages(module: torch.nn.Module) -> Iterator[torch.UntypedStorage]:
    for parameter in module.parameters():
        local = getattr(parameter, "_local_tensor", parameter.data)
        yield local.untyped_storage()
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor.untyped_storage()


def whole_bytes(folder: Path, case: Case) -> int:
    """Bytes of the student's weights in float32."""
    from orchestrator.models import load_student

    model = load_student(run_config(folder, case).student, gradient_checkpointing=False, seed=0)
    return sum(p.numel() * 4 for p in model.parameters())


if __name__ == "__main__":
    main(Side(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), CASES, sys.argv[4:])
