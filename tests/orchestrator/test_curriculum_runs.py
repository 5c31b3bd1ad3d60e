"""Whole runs under a curriculum that listens: what it says reaches the rows as late as declared, and a kill changes nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.draws import Draws
from orchestrator.order import Order
from orchestrator.rows import Rows
from orchestrator.run import distill, resume
from strategies.curriculum import ddk_start, ddk_update
from tests.orchestrator.test_faults import cluster, driver, kill_when, wait_for_step
from tests.tiny import source_text, tiny_model, tiny_tokenizer

STEPS, ROWS, EVERY, LAG = 18, 8, 3, 2
CURRICULUM = {
    "order": {"by": "length", "pace": {"start": 0.3, "rise": 0.2, "patience": 1, "smoothing": 0.0, "least_fall": 9.0}},
    "mixture": {"type": "ddk", "domains": ["code", "words"], "alpha": 0.8},
    "lag_steps": LAG,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student, and lines of two domains, of uneven length."""
    folder = tmp_path_factory.mktemp("curricula")
    tokenizer = tiny_tokenizer(folder / "model")
    tiny_model(folder / "model", vocab_size=len(tokenizer))
    lines = [line for line in source_text().splitlines() if line.strip()][:200]
    words = ["one two three " * (1 + i % 4) for i in range(60)]
    rows = [{"text": line, "kind": "code"} for line in lines] + [{"text": line, "kind": "words"} for line in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(home: Path, name: str, **train: Any) -> dict[str, Any]:
    return {
        "name": name,
        "student": str(home / "model"),
        "strategy": {"type": "logits", "top_k": 8},
        "curriculum": CURRICULUM,
        "endpoints": {"teacher": {"engine": "fake", "vocabulary": 512, "seconds_per_bundle": 0.15}},
        "data": {"train": str(home / "rows.jsonl"), "domain": "kind", "held_out_rows": 24, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": ROWS, "lr": 3e-3, "layout": "single", "micro_batch_tokens": 128} | train,
        "evaluate": {"every_steps": EVERY},
        "checkpoint": {"every_steps": 5},
    }


def journal(home: Path, name: str, of: str) -> dict[int, dict[str, float]]:
    """Values of the steps or evaluations of a run."""
    rows = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["values"] for r in rows if of in r["values"]}


def shown(home: Path, name: str) -> list[list[float]]:
    """What a run shows of each step; asserts that every step is there once."""
    steps = journal(home, name, "loss")
    assert list(steps) == list(range(1, STEPS + 1))
    names = ("row_id_sum", "curriculum/share/code", "curriculum/open", "control/mixture/code", "control/pace", "loss")
    return [[values[n] for n in names] for values in steps.values()]


@pytest.fixture(scope="module")
def undisturbed(home: Path, ray_session: str) -> list[list[float]]:
    distill(recipe(home, "undisturbed"), cluster=cluster(home))
    return shown(home, "undisturbed")


def test_the_mixture_is_that_of_the_evaluations_and_rows_follow_it_as_late_as_declared(home: Path, undisturbed: list[list[float]]) -> None:
    evaluations, mixture = journal(home, "undisturbed", "eval/cross_entropy"), {0: 0.5}
    shares: list[float] = []
    for step, values in evaluations.items():
        if step % EVERY == 0 or step % 5 == 0:
            ratios = [
                min(10.0, 2.718281828459045 ** (values[f"eval/cross_entropy/{d}"] - values[f"eval/teacher_cross_entropy/teacher/{d}"]))
                for d in ("code", "words")
            ]
            shares = ddk_update(shares, ratios, 0.8) if shares else ddk_start(ratios)
            mixture[step] = shares[0]
    said = [mixture[max(s for s in mixture if s < step)] for step in range(1, STEPS + 1)]
    assert [row[3] for row in undisturbed] == pytest.approx(said)
    assert len(set(said)) > 3
    target = drawn = 0.0
    for step, row in enumerate(undisturbed, start=1):
        due = step - 1 - LAG  # that version went out before the evaluation that followed it: with what was said to its own step
        target += ROWS * (said[due - 1] if due > 0 else 0.5)
        drawn += ROWS * row[1]
        assert abs(drawn - target) <= 1, f"step {step}"


def test_the_pace_rises_when_the_loss_does_not_fall_enough(undisturbed: list[list[float]]) -> None:
    told = [row[4] for row in undisturbed]
    assert told == pytest.approx([min(1.0, 0.3 + 0.2 * max(0, step - 2)) for step in range(1, STEPS + 1)])
    assert [row[2] for row in undisturbed] == pytest.approx([told[max(0, step - 1 - LAG)] for step in range(1, STEPS + 1)])


def test_a_killed_worker_changes_nothing(home: Path, undisturbed: list[list[float]]) -> None:
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_when, home, "killed", 8, "RayTrainWorker")
        distill(recipe(home, "killed"), cluster=cluster(home))
        assert killed.result()
    assert shown(home, "killed") == undisturbed


def test_a_killed_driver_goes_on_with_two_workers(home: Path, undisturbed: list[list[float]]) -> None:
    path = home / "driver.yaml"
    path.write_text(json.dumps(recipe(home, "driver", layout="ddp")))
    process = driver(home, [str(path)])
    wait_for_step(home, "driver", 8)
    process.kill()
    process.wait()
    resume(home / "runs" / "driver", ["train.workers=2"], cluster=cluster(home))
    assert shown(home, "driver") == [pytest.approx(row, rel=1e-4) for row in undisturbed]


def test_rows_come_in_the_order_of_the_students_loss_as_it_begins(home: Path, ray_session: str) -> None:
    content = recipe(home, "losses", steps=4) | {"curriculum": {"order": {"by": "student-loss", "pace": 0.1}}, "strategy": "cross-entropy"}
    del content["endpoints"], content["evaluate"]
    distill(content, cluster=cluster(home))
    (folder,) = (home / "runs" / "data").glob("data-*/train/loss-*.npy")
    losses, rows = np.load(folder), Rows(str(folder.parents[1]), "train")
    assert len(losses) == len(rows) and 5 < losses.mean() < 7, "near the logarithm of the vocabulary"
    easiest = set(np.argsort(losses)[: int(np.ceil(0.1 * len(rows)))].tolist())
    order = Order(str(folder.parents[1]), 0, 4, 1, batch_rows=ROWS, draws=Draws(open=np.asarray([0.1]), sort_by=folder.stem))
    expected, cursor = [], dict[str, float]()
    for step in range(1, 5):
        (part,), cursor = order.take(step, {}, cursor)
        assert set(part.tolist()) <= easiest
        expected.append(float(part.sum()))
    assert [values["row_id_sum"] for values in journal(home, "losses", "loss").values()] == expected


def test_skills_that_the_student_fails_are_drawn_on_policy_as_late_as_it_is_old(home: Path, ray_session: str) -> None:
    verifier = {"engine": "verifier", "kind": "callable", "function": "tests.orchestrator.verdicts:even"}
    mixture = {"type": "skills", "domains": ["code", "words"], "smoothing": 0.0, "alpha": 0.9}
    content = recipe(home, "skills", steps=8) | {
        "strategy": {"type": "kdrl", "samples": 2, "max_new_tokens": 6, "staleness": 1},
        "curriculum": {"mixture": mixture},
        "endpoints": {"teacher": {"engine": "fake", "vocabulary": 512}, "verifier": verifier},
    }
    distill(content, cluster=cluster(home))
    steps, profile = journal(home, "skills", "loss"), dict[str, float]()
    said: list[float] = []
    for values in steps.values():
        said.append(values["control/mixture/code"])
        share = profile.get("code", 0.0) / sum(profile.values()) if sum(profile.values()) else 0.5
        assert said[-1] == pytest.approx(0.1 * 0.5 + 0.9 * share)
        profile |= {d: values[f"rollout/failed/{d}"] for d in ("code", "words") if f"rollout/failed/{d}" in values}
    assert len(set(said)) > 2
    target = drawn = 0.0
    for step, values in steps.items():
        target, drawn = target + ROWS * said[max(0, step - 2)], drawn + ROWS * values["curriculum/share/code"]
        assert abs(drawn - target) <= 1 and values["age_steps"] == min(1, step - 1)
