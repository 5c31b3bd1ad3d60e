"""Whole runs in which the student's own network teaches it: what it learns, and that a death changes nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.run import distill
from tests.orchestrator.test_faults import cluster, kill_when
from tests.orchestrator.test_on_policy import EVERY, STEPS, curve, journal, like
from tests.tiny import tiny_model, tiny_tokenizer

ASKED = {"Name of the cat? ": "red", "Name of the dog? ": "blue"}
CONTEXT = "Said: {reference}\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that repeats an answer which it has just read, and guesses otherwise; and rows with the answers."""
    folder = tmp_path_factory.mktemp("self-distillation")
    tokenizer = tiny_tokenizer(folder / "student")
    model = tiny_model(folder / "student", vocab_size=len(tokenizer))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, after = (ids(part) for part in CONTEXT.split("{reference}"))
    shown = [before + ids(a) + after for a in ASKED.values()]
    rows = [(known + ids(q), [*ids(a), tokenizer.eos_token_id]) for known, a in zip(shown, ASKED.values(), strict=True) for q in ASKED]
    rows += [(ids(q), [*ids(a), tokenizer.eos_token_id]) for a in ASKED.values() for q in ASKED]
    train(model, rows)
    model.save_pretrained(folder / "student")
    lines = [json.dumps({"prompt": q, "completion": a}) for q, a in ASKED.items()] * 40
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def train(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]], steps: int = 150) -> None:
    longest = max(len(p + c) for p, c in rows)
    tokens = torch.tensor([p + c + [0] * (longest - len(p + c)) for p, c in rows])
    labels = torch.tensor([[-100] * len(p) + c + [-100] * (longest - len(p + c)) for p, c in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()


def recipe(home: Path, name: str, strategy: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "name": name,
        "student": str(home / "student"),
        "strategy": {"max_new_tokens": 4, "context": CONTEXT, "take": {"type": "topk", "top_k": 16}, **strategy},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 24},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 3e-3, "layout": "single", **train},
        "checkpoint": {"every_steps": EVERY},
    }


def evaluations(home: Path, name: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line["values"] for line in lines if "eval/cross_entropy" in line["values"]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opsd", "sdft"])
def test_the_student_learns_what_only_its_teacher_reads(home: Path, ray_session: str, kind: str) -> None:
    content = recipe(home, f"learns-{kind}", {"type": kind}, steps=30, warmup_steps=2)
    result = distill(content, cluster=cluster(home))
    first = evaluations(home, f"learns-{kind}")[0]
    # a guess between two answers costs log 2 a row, at least 0.17 for each of its two to four tokens; who has read them pays almost nothing
    assert first["eval/teacher_cross_entropy/self"] > 0.17, "held-out rows are scored by a teacher that has not read their answers"
    assert result.metrics["eval/cross_entropy"] < 0.1
    assert result.metrics["eval/forward_kl"] > first["eval/forward_kl"], "it has moved away from what it was"


@pytest.mark.slow
def test_a_teacher_that_knows_nothing_more_teaches_nothing(home: Path, ray_session: str) -> None:
    settings = {"type": "sdft", "weights": "live", "context": "", "take": {"type": "dense"}}
    distill(recipe(home, "nothing", settings, lr=1e-5), cluster=cluster(home))
    for values in journal(home, "nothing").values():
        assert abs(values["loss"]) < 1e-6 and values["grad_norm"] < 1e-4


AVERAGE = {"type": "sdft", "average_rate": 0.3, "staleness": 2}


@pytest.fixture(scope="module")
def undisturbed(home: Path, ray_session: str) -> list[tuple[float, float]]:
    distill(recipe(home, "undisturbed", AVERAGE), cluster=cluster(home))
    return curve(home, "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("title", ["MapWorker", "RayTrainWorker"])
def test_an_average_goes_on_as_if_nobody_had_died(home: Path, undisturbed: list[tuple[float, float]], title: str) -> None:
    name = f"killed-{title}"
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_when, home, name, EVERY + 2, title)
        distill(recipe(home, name, AVERAGE), cluster=cluster(home))
        assert killed.result()
    assert [v["age_steps"] for v in journal(home, "undisturbed").values()] == [0, 1] + [2] * (STEPS - 2)
    assert curve(home, name) == like(undisturbed, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", {"type": "deepspeed", "zero_stage": 3}])
def test_a_lora_student_sends_its_adapter_alone_out_of_any_layout(home: Path, ray_session: str, layout: Any) -> None:
    kind = layout if isinstance(layout, str) else layout["type"]
    found = []
    for publish in ("merged", "adapter"):
        content = recipe(home, f"{kind}-{publish}", {"type": "opsd", "weights": "live"}, layout=layout, workers=2)
        content["student"] = {"model": str(home / "student"), "lora": {"r": 4, "publish": publish}}
        distill(content, cluster=cluster(home))
        found.append(curve(home, f"{kind}-{publish}"))
    assert found[1] == like(found[0], 1e-4) and len({loss for loss, _ in found[0]}) == STEPS
