"""What a worker with a frozen player really holds, against the estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config import TransformersEndpoint
from orchestrator.memory import with_frozen, worker_memory
from orchestrator.sketch import student_network, teacher_network
from tests.orchestrator import test_memory as plain
from tests.tiny import tiny_model

WORKER = """
def worker(recipe, columns):
    from cluster.config import TransformersEndpoint
    from orchestrator import train
    from orchestrator.config import load_job
    from orchestrator.frozen import load_frozen_players
    from orchestrator.teachers import Teachers
    from orchestrator.players import load_players
    from strategies.core import Progress

    recipe, teacher = recipe["recipe"], recipe["teacher"]
    run, cpu = load_job(recipe).run, torch.device("cpu")
    strategy = run.strategy.build()
    frozen = load_frozen_players(strategy.players, {"teacher": TransformersEndpoint(model=teacher)}, None, False, cpu)
    players = load_players(run, strategy.players, cpu, strategy.updates, frozen)
    for step in range(2):
        networks = train.Networks(players, Teachers(strategy.signals, frozen=frozen), cpu)
        train.train_step(strategy, networks, [columns], Progress(step, 2), run, Wish.NOTHING)
    return players["student"].held_bytes()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "micro", "micros"), [(4 * plain.LENGTH, (4, plain.LENGTH), 2), (8192, (8, plain.LENGTH), 1)])
def test_a_worker_with_a_frozen_player_holds_what_was_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, micro: tuple[int, int], micros: int
) -> None:
    for name, width, layers in (("student", 256, 4), ("teacher", 768, 16)):
        tiny_model(tmp_path / name, vocab_size=plain.VOCABULARY, width=width, layers=layers, heads=8)
    model, guide = str(tmp_path / "student"), str(tmp_path / "teacher")
    content = plain.recipe(model, micro_batch_tokens=tokens) | {"strategy": {"type": "inner-states", "kd_weight": 0.0}}
    start = plain.MEASURE.index("def worker"), plain.MEASURE.index("def scorer")
    monkeypatch.setattr(plain, "MEASURE", plain.MEASURE[: start[0]] + WORKER.lstrip() + "\n" + plain.MEASURE[start[1] :])
    real = plain.measured("worker", {"recipe": content, "teacher": guide}, plain.ROWS)
    run = plain.run_of(content)
    saved = TransformersEndpoint(model=guide).saved_model
    assert saved is not None
    work = plain.work(micro, micros)
    alone = worker_memory(run, student_network(run.student), work, plain.WORKER)
    estimate = with_frozen(alone, [(teacher_network("teacher", guide, None, False, "auto"), saved, 768)], [], 256 * 768, work)
    assert plain.near(estimate.total, real["peak"]), (json.dumps(dict(estimate.parts)), real)
    assert alone.total < 0.8 * real["peak"]
