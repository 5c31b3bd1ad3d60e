"""Trains a student on inner states of a frozen player under every layout, in plain processes, without Ray.

`python -m tests.harness_features FOLDER RANK WORLD [CASE...]`. Two processes make a pair and a third runs alone; each
writes what it measured to `FOLDER/<world>_<rank>.json`.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.train import Checkpoint

from cluster.config import TransformersEndpoint
from orchestrator import checkpoint, evaluate
from orchestrator.config import RunConfig
from orchestrator.frozen import FrozenPlayer, load_frozen_players
from orchestrator.layouts import Layout
from orchestrator.microbatch import cut
from orchestrator.players import load_players
from orchestrator.teachers import Teachers
from orchestrator.train import Networks, train_step
from orchestrator.wishes import Wish
from strategies.core import Columns, Player, Progress, StatesTerm, Strategy, Term, lm_update
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.features import HiddenStates, Matched
from strategies.objectives.filtered import FilteredLayers, FilterTask
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.relations import Relations
from strategies.schedule import constant
from strategies.sources import TakeTopK, Taught, scored_columns
from strategies.taps import Layer
from tests import harness_layouts as plain
from tests.harness_layouts import ALONE, BOTH, CPU, PAIR, Case, merged, part_of

STEPS, SAVED, AFTER = 14, 7, 5
"""Steps from the start, the step after which the pair saves, and the steps made again from there."""
GUIDE_WIDTH, GUIDE_LAYERS, HEADS = 24, 3, 2
SCALES = {"kd": 0.9, "ce": 0.1, "hidden": 0.5, "cosine": 0.3, "relations": 0.2, "task": 0.1, "match": 0.4}
CASES = (
    Case("single", "single", (ALONE,)),
    Case("ddp", "ddp", BOTH),
    Case("fsdp2", "fsdp2", BOTH),
    Case("zero0", "deepspeed", BOTH, 0),
    Case("zero1", "deepspeed", stage=1),
    Case("zero2", "deepspeed", BOTH, 2),
    Case("zero3", "deepspeed", BOTH, 3),
    Case("ddp_recompute", "ddp", recompute=True),
    Case("fsdp2_recompute", "fsdp2", recompute=True),
    Case("zero3_recompute", "deepspeed", stage=3, recompute=True),
    Case("single_packed", "single", (ALONE,), batching="packed"),
    Case("fsdp2_packed", "fsdp2", batching="packed"),
    Case("single_lora", "single", (ALONE,), lora=True),
    Case("fsdp2_lora", "fsdp2", lora=True),
    Case("zero3_lora", "deepspeed", stage=3, lora=True),
    Case("ddp_bf16", "ddp", precision="bfloat16"),
    Case("fsdp2_bf16", "fsdp2", precision="bfloat16"),
    Case("zero1_bf16", "deepspeed", stage=1, precision="bfloat16"),
    Case("zero3_bf16", "deepspeed", stage=3, precision="bfloat16"),
    Case("ddp_only_states", "ddp", BOTH, tied=False),
    Case("fsdp2_only_states", "fsdp2", tied=False),
    Case("zero3_only_states", "deepspeed", stage=3, tied=False),
)


def only_states(case: Case) -> bool:
    """Whether no term reads logits, and the last layer only learns through others."""
    return case.name.endswith("only_states")


def strategy_of(case: Case) -> Strategy:
    """Logits of a column, and inner states of the frozen player `guide`: filters of two terms, two that two terms share, and an
    objective without any."""
    kd = Term("kd", ForwardKL(), constant(SCALES["kd"]), signal="teacher")
    ce = Term("ce", CrossEntropy(), constant(SCALES["ce"]))
    hidden = HiddenStates(layers=(Matched(student=Layer(number=1), teacher=Layer(depth=0.5)),))
    half = (Layer(depth=0.5),)
    task, match = FilterTask(layers=half, filter="gelu-linear"), FilteredLayers(layers=half, filter="gelu-linear")
    terms: tuple[Any, ...] = (
        StatesTerm("hidden", hidden, constant(SCALES["hidden"]), "guide"),
        StatesTerm("cosine", HiddenStates(distance="cosine"), constant(SCALES["cosine"]), "guide"),
        StatesTerm("relations", Relations(heads=HEADS), constant(SCALES["relations"]), "guide"),
        StatesTerm("task", task, constant(SCALES["task"]), "guide", filters="ted"),
        StatesTerm("match", match, constant(SCALES["match"]), "guide", filters="ted"),
        kd,
        ce,
    )
    players = {"student": Player(), "guide": Player(model="guide", trained=False)}
    return Strategy(
        players,
        (lm_update(*terms[: 1 if only_states(case) else None]),),
        signals={"teacher": Taught(TakeTopK(top_k=plain.TOP_K), endpoint="teacher")},
    )


def bundle(step: int, part: int) -> Columns:
    """That of the plain harness, without the step that is not finite, and with uneven weights for the hidden states."""
    columns = plain.bundle(step, part)
    if not np.isfinite(columns["weights/ce"]).all():
        columns["weights/ce"] = np.ones_like(columns["weights/ce"])
    draw = np.random.default_rng((step, part, 1))
    weights = draw.uniform(0, 2, size=len(columns["weights/ce"])) * (draw.random(len(columns["weights/ce"])) < 0.6)
    return {**columns, "weights/hidden": weights.astype(np.float32)}


def whole_step(step: int) -> Columns:
    """All rows of a step in one bundle."""
    parts = [bundle(step, part) for part in range(PAIR)]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def guide(folder: Path, packed: bool = False) -> dict[str, FrozenPlayer]:
    """The frozen player of every case."""
    endpoints = {"guide": TransformersEndpoint(model=str(folder / "guide"))}
    return load_frozen_players(strategy_of(CASES[0]).players, endpoints, None, packed, CPU)


@dataclass(frozen=True)
class Side:
    """One process of the pair, or the one alone."""

    folder: Path
    rank: int
    world: int

    def measure(self, case: Case) -> dict[str, Any]:
        """The curve from the first step, with an evaluation on its way, and the curve again from the checkpoint."""
        print(f"{case.name} at {self.world}", file=sys.stderr, flush=True)
        run, players, frozen = self._load(case)
        steps = []
        for step in range(STEPS):
            steps.append(self._step(run, case, players, frozen, step))
            if step + 1 == SAVED:
                self._evaluate(run, players["student"])
                self._save(case, players)
        held = players["student"].held_bytes()
        run, players, frozen = self._load(case)
        position = checkpoint.restore(players, Checkpoint.from_directory(str(merged(self.folder, case, self.world))))
        again = [self._step(run, case, players, frozen, step) for step in range(position.step, position.step + AFTER)]
        return {"steps": steps, "again": again, "held": held}

    def _load(self, case: Case) -> tuple[RunConfig, dict[str, Layout], dict[str, FrozenPlayer]]:
        run, strategy = plain.run_config(self.folder, case), strategy_of(case)
        frozen = guide(self.folder, case.batching == "packed")
        return run, load_players(run, strategy.players, CPU, strategy.updates, frozen), frozen

    def _step(self, run: RunConfig, case: Case, players: Any, frozen: Any, step: int) -> dict[str, float]:
        columns = whole_step(step) if self.world == ALONE else bundle(step, self.rank)
        strategy = strategy_of(case)
        networks = Networks(players, Teachers(strategy.signals, frozen=frozen), CPU)
        _, metrics = train_step(strategy, networks, [columns], Progress(step, plain.STEPS), run, Wish.NOTHING)
        return metrics

    def _evaluate(self, run: RunConfig, student: Layout) -> None:
        """What must leave training alone: forwards in which no filter has work."""
        train = run.train
        measured = {"teacher": Taught(TakeTopK(top_k=plain.TOP_K), endpoint="teacher")}
        micros = cut(bundle(0, 0), scored_columns(measured), train.batching, train.micro_batch_tokens, run.data.max_length_tokens)
        evaluate.evaluate(student, micros, evaluate.evaluation_terms(measured), len(micros), Teachers(measured), CPU)

    def _save(self, case: Case, players: dict[str, Layout]) -> None:
        part = checkpoint.save(players, checkpoint.Position(SAVED, 1, {}), self.rank)
        to = part_of(self.folder, case, self.world, self.rank)
        shutil.move(part.path, to.with_suffix(".moving"))
        to.with_suffix(".moving").rename(to)


if __name__ == "__main__":
    plain.main(Side(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), CASES, sys.argv[4:])
