"""Estimates against what processes really hold: within a fifth, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Resources, TransformersEndpoint
from cluster.resources import Demand, Share
from orchestrator import memory
from orchestrator.config import LayoutConfig, Lora, RunConfig, StudentConfig, load_job
from orchestrator.data import PreparedData, SplitInfo
from orchestrator.layouts import layout_facts
from orchestrator.memory import Work, disk, scorer_memory, worker_memory
from orchestrator.models import load_student
from orchestrator.sketch import saved_bytes_per_forward, student_network, teacher_network
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
VOCABULARY, ROWS, LENGTH, TOP_K = 8192, 8, 128, 64
FIFTH = 0.2
SHARE = Share(cpus=1.0, gpus=0.0, threads=1)
WORKER = Demand("worker", 1, SHARE)

MEASURE = """
import json, sys
from pathlib import Path
import numpy as np, torch

def bundle(rows, length, vocabulary, top_k):
    rng = np.random.default_rng(0)
    mask = np.ones(rows * length, np.uint8)
    mask[::length] = 0
    n = int(mask.sum())
    ids = rng.integers(0, vocabulary - top_k, (n, 1)) + np.arange(top_k)
    return {
        "tokens": rng.integers(0, vocabulary, rows * length).astype(np.int32),
        "lengths": np.full(rows, length, np.int32),
        "loss_mask": mask,
        "teacher/ids": ids.astype(np.int32).ravel(),
        "teacher/logprobs": np.full(n * top_k, np.log(0.9 / top_k), np.float32),
        "teacher/logprob": np.zeros(n, np.float32),
    }

def worker(recipe, columns):
    from orchestrator import checkpoint, train
    from orchestrator.config import load_job
    from orchestrator.players import load_players
    from orchestrator.teachers import Teachers
    from orchestrator.wishes import Wish
    from strategies.core import Progress

    run, cpu = load_job(recipe).run, torch.device("cpu")
    strategy = run.strategy.build()
    players = load_players(run, strategy.players, cpu)
    for step in range(2):
        networks = train.Networks(players, Teachers(strategy.signals), cpu)
        train.train_step(strategy, networks, [columns], Progress(step, 2), run, Wish.NOTHING)
    saved = checkpoint.save(players, checkpoint.Position(2, 1, {}), 0).path
    size = sum(f.stat().st_size for f in Path(saved).rglob("*") if f.is_file())
    return {**players["student"].held_bytes(), "checkpoint": size}

def scorer(model, columns):
    import ray.data
    from cluster.config import TransformersEndpoint
    from cluster.engines.transformers import TransformersEngine

    from strategies.core import ScoreRequest

    TransformersEngine(TransformersEndpoint(model=model), threads=1).score(columns, ScoreRequest("topk", top_k=64))
    return {}

who, given, size = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)

def peak():  # not `ru_maxrss`, which begins with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

found = {"worker": worker, "scorer": scorer}[who](given, bundle(*size))
print(json.dumps(found | {"peak": peak()}))
"""


def measured(who: str, given: object, rows: int) -> Mapping[str, int]:
    size = json.dumps([rows, LENGTH, VOCABULARY, TOP_K])
    words = [sys.executable, "-c", MEASURE, who, json.dumps(given), size]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """23 million parameters."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, vocab_size=VOCABULARY, width=512, layers=8, heads=8)
    return str(folder)


def recipe(model: str, **train: Any) -> dict[str, Any]:
    return {"student": model, "strategy": "logits", "data": "none", "train": {"steps": 2, "layout": "single", **train}}


def work(micro: tuple[int, int], micros: int) -> Work:
    return Work(micro, micros, {"teacher": micro[0] * micro[1]}, ROWS * LENGTH * (5 + TOP_K * 8), 2)


def run_of(content: dict[str, Any]) -> RunConfig:
    return load_job(content).run


def near(estimate: int, real: int) -> bool:
    return abs(estimate - real) <= FIFTH * real


@pytest.mark.parametrize(
    ("train", "micro", "micros"),
    [
        ({"micro_batch_tokens": 4 * LENGTH}, (4, LENGTH), 2),
        pytest.param({}, (8, LENGTH), 1, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, (8, LENGTH), 1, marks=pytest.mark.slow),
        pytest.param({"precision": "bfloat16"}, (8, LENGTH), 1, marks=pytest.mark.slow),
    ],
    ids=["two micro-batches", "one", "recomputed", "bfloat16"],
)
def test_a_worker_holds_what_was_estimated(model: str, train: dict[str, Any], micro: tuple[int, int], micros: int) -> None:
    run = run_of(recipe(model, **train))
    student = student_network(run.student)
    real = measured("worker", recipe(model, **train), ROWS)
    estimate = worker_memory(run, student, work(micro, micros), WORKER)
    assert near(estimate.total, real["peak"]), (estimate, real)
    assert near(estimate.parts["weights"], real["parameters"]) and near(estimate.parts["optimizer"], real["optimizer"])
    assert near(disk(run, student, data(), 2, 0).checkpoint, real["checkpoint"])


def test_a_scorer_holds_what_was_estimated(model: str) -> None:
    saved = TransformersEndpoint(model=model, resources=Resources()).saved_model
    assert saved is not None
    real = measured("scorer", model, rows=32)
    teacher = teacher_network("teacher", model, None, False, "auto")
    estimate = scorer_memory(teacher, saved, work((32, LENGTH), 1), Demand("teacher", 1, SHARE))
    assert near(estimate.total, real["peak"]), (estimate, real)


def data() -> PreparedData:
    split = SplitInfo(rows=10, tokens=1000, loss_tokens=900, longest_tokens=100)
    return PreparedData("folder", "0", split, split, "documents", 0, 20, {}, "0", "file", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_sketch_counts_as_the_loaded_network_does(model: str, lora: Lora | None, init: Any) -> None:
    config = StudentConfig(model=model, init=init, lora=lora)
    loaded, sketch = load_student(config, gradient_checkpointing=False, seed=0), student_network(config)
    assert sketch.parameters == sum(p.numel() for p in loaded.parameters())
    assert sketch.trained == sum(p.numel() for p in loaded.parameters() if p.requires_grad)


def test_an_adapter_keeps_less_and_recomputing_least(model: str) -> None:
    student = student_network(StudentConfig(model=model))
    sizes = [
        saved_bytes_per_forward(student, config, 4, 64, bf16=False, checkpointing=again)
        for config, again in [
            (StudentConfig(model=model), False),
            (StudentConfig(model=model, lora=Lora(r=4)), False),
            (StudentConfig(model=model), True),
        ]
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_deep_networks_are_extrapolated_from_shallow_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tmp_path, layers=9)
    config = StudentConfig(model=str(tmp_path))
    guessed, again = (saved_bytes_per_forward(student_network(config), config, 2, 32, False, c) for c in (False, True))
    monkeypatch.setattr("orchestrator.sketch.WHOLE_LAYERS", 9)
    counted, counted_again = (saved_bytes_per_forward(student_network(config), config, 2, 32, False, c) for c in (False, True))
    assert abs(guessed - counted) < 0.01 * counted and abs(again - counted_again) < 0.01 * counted_again


@pytest.mark.parametrize(
    ("layout", "weights", "gradients", "optimizer"),
    [
        (LayoutConfig(type="single"), 1.0, 1.0, 2.0),
        (LayoutConfig(type="ddp"), 1.0, 2.0, 2.0),
        (LayoutConfig(type="fsdp2"), 0.25, 0.25, 0.5),
        (LayoutConfig(type="deepspeed", zero_stage=0), 1.0, 1.0, 2.0),
        (LayoutConfig(type="deepspeed", zero_stage=1), 1.0, 1.0, 0.75),
        (LayoutConfig(type="deepspeed", zero_stage=2), 1.0, 0.25, 0.75),
        (LayoutConfig(type="deepspeed", zero_stage=3), 0.25, 0.25, 0.75),
    ],
)
def test_layouts_hold_their_share(model: str, layout: LayoutConfig, weights: float, gradients: float, optimizer: float) -> None:
    """In copies of the whole network's numbers, on one of four workers; ZeRO keeps exact weights beside its moments."""
    run = run_of(recipe(model))
    run = run.model_copy(update={"train": run.train.model_copy(update={"layout": layout, "workers": 4})})
    student = student_network(run.student)
    parts = worker_memory(run, student, work((2, 16), 2), Demand("worker", 4, SHARE)).parts
    whole = 4 * student.parameters
    found = {k: parts[k] / whole for k in ("weights", "gradients", "optimizer")}
    assert found == pytest.approx({"weights": weights, "gradients": gradients, "optimizer": optimizer}, rel=1e-6)
    assert layout_facts(layout).held(layout, 1).weights == 1.0


def test_an_offloaded_optimizer_is_in_the_host_memory(model: str) -> None:
    run = run_of(recipe(model))
    on_gpu = Demand("worker", 2, Share(1.0, 1.0, 1))
    layout = LayoutConfig(type="deepspeed", zero_stage=2, offload_optimizer=True)
    train = run.train.model_copy(update={"layout": layout, "workers": 2})
    student = student_network(run.student)
    here = worker_memory(run.model_copy(update={"train": train}), student, work((2, 16), 2), on_gpu)
    assert here.parts["optimizer"] == 0 and here.host > memory.WORKER_BYTES + 4 * student.parameters
    assert here.device + here.host == here.total and here.device > 4 * student.parameters


def test_disk_counts_every_checkpoint_that_lies_there_at_once(model: str) -> None:
    content = recipe(model)
    content["checkpoint"] = {"every_steps": 10, "keep": 3}
    run = run_of(content)
    student = student_network(run.student)
    assert [disk(run, student, data(), steps, 0).checkpoints for steps in (5, 30, 1000)] == [1, 3, 5]
    needed = disk(run, student, data(), 5, 84)
    assert needed.held_out == 1000 * 5 + 900 * (10 * 8 + 4)
    assert needed.needed == needed.checkpoint + needed.export + needed.held_out
    assert needed.export == 4 * student.parameters
