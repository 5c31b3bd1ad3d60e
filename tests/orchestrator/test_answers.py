"""How often the student is right, measured by training workers while it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import VerifierEndpoint
from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.answers import Answering, Answers
from orchestrator.config import LayoutConfig, Lora, StudentConfig
from orchestrator.errors import Refusal
from orchestrator.layouts import Layout, Numerics, make_layout
from orchestrator.models import StudentModule, load_student
from orchestrator.plan import plan_text
from orchestrator.run import distill
from strategies.core import Columns, Sampling
from tests.orchestrator.bench import Bench
from tests.orchestrator.test_faults import cluster
from tests.tiny import tiny_model, tiny_pair

NEW, FIRST = 4, 100
PROMPTS = ([5, 6, 7], [9, 10], [11, 12, 13, 14], [15, 16])


class Same:
    """Right is what has the reference's very tokens; about row 102 it says nothing."""

    def judge(self, columns: Columns) -> Columns:
        texts = np.split(columns["tokens"][columns["loss_mask"].astype(bool)], len(columns["lengths"]))
        known = np.split(columns["reference"], np.cumsum(columns["reference_lengths"])[:-1])
        told = np.asarray([reference[0] != 0 for reference in known], np.uint8)
        right = [float(np.array_equal(t, r)) for t, r in zip(texts, known, strict=True)]
        nobody = np.zeros(1, np.int64)
        return {"reward": np.asarray(right, np.float32) * told, "judged": told, "failed": nobody, "unjudgeable": nobody}


def layout(folder: Path, **student: Any) -> Layout:
    tiny_model(folder)
    model = load_student(StudentConfig(model=str(folder), **student), False, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made = make_layout(
        LayoutConfig(type="single"),
        StudentModule(model),
        lambda p: torch.optim.SGD(p.values(), 0.1),
        Numerics(1.0, torch.float32, torch.device("cpu")),
    )
    made.module.train()
    return made


def likeliest(student: Layout, prompt: list[int]) -> list[int]:
    """Token after token, with the whole text read anew."""
    ids, model = list(prompt), student.module.model
    for _ in range(NEW):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def held_out(completions: list[list[int]]) -> Columns:
    rows = [[*p, *c] for p, c in zip(PROMPTS, completions, strict=True)]
    masks = [[0] * len(p) + [1] * len(c) for p, c in zip(PROMPTS, completions, strict=True)]
    return {
        "tokens": np.concatenate(rows).astype(np.int32),
        "lengths": np.asarray([len(r) for r in rows], np.int32),
        "loss_mask": np.concatenate(masks).astype(np.uint8),
        "row_id": np.arange(FIRST, FIRST + len(rows)),
    }


def measured(student: Layout, rows: int, bundles: list[Columns]) -> dict[str, float]:
    given = Answers(VerifierEndpoint(engine="verifier", kind="exact"), Sampling(max_new_tokens=NEW), FIRST, rows, 64, 512, 256)
    answering = Answering(given)
    answering.__dict__["_judge"] = Same()
    return answering.measure(student, bundles)


@pytest.mark.parametrize("student", [{}, {"lora": Lora(r=4)}])
def test_accuracy_is_the_share_of_judged_answers_that_are_right(tmp_path: Path, student: Any) -> None:
    whole = layout(tmp_path, **student)
    right = [likeliest(whole, p) for p in PROMPTS]
    completions = [right[0], [1, 2], [0], right[3]]
    before = {name: p.clone() for name, p in whole.module.named_parameters()}
    assert measured(whole, 4, [held_out(completions)]) == {"eval/accuracy": 2 / 3, "eval/judged": 3 / 4}
    assert measured(whole, 2, [held_out(completions)]) == {"eval/accuracy": 1 / 2, "eval/judged": 1.0}
    assert measured(whole, 4, []) == {"eval/accuracy": 0.0, "eval/judged": 0.0}
    assert whole.module.training and all(torch.equal(p, before[name]) for name, p in whole.module.named_parameters())
    assert all(p.grad is None for p in whole.module.parameters()) and Answering(None).measure(whole, []) == {}


ASKED = ("evaluate.answers={max_new_tokens: 8}", "endpoints.verifier={engine: verifier, kind: exact}")
NOWHERE = "endpoints.verifier={engine: verifier, kind: callable, function: 'tests.orchestrator.missing:right'}"


def test_the_door_knows_the_metric_and_its_judge(bench: Bench) -> None:
    plan = bench.plan(*ASKED, "checkpoint.best_metric=eval/accuracy", "alarms={golden: eval/accuracy, golden_versus_proxy: false}")
    found = plan.answers
    assert found is not None and (found.rows, found.sampling.max_new_tokens, found.longest_tokens) == (32, 8, 512)
    assert found.first_row == plan.data.train.rows and found.sampling.stop and found.judge.tokenizer is not None
    assert "8 held-out prompts are answered each time, in up to 8 tokens; verifier judges" in " ".join(plan_text(plan).split())
    assert not any("verifier" in w for w in plan.warnings) and bench.plan().answers is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (ASKED[:1], ["evaluate.answers.verifier", "'verifier', which nothing defines", "engine: verifier"]),
        (("evaluate.answers={verifier: teacher}",), ["evaluate.answers.verifier", "'transformers'", "an endpoint that judges"]),
        ((*ASKED, "train.layout=fsdp2", "train.workers=2"), ["evaluate.answers", "fsdp2, which shards", "single or ddp"]),
        ((*ASKED, "evaluate.answers.max_new_tokens=512"), ["evaluate.answers.max_new_tokens", "512 positions"]),
        ((ASKED[0], NOWHERE), ["endpoints.verifier.function", "'tests.orchestrator.missing:right'", "ModuleNotFoundError"]),
        (("checkpoint.best_metric=eval/accuracy",), ["checkpoint.best_metric", "eval/perplexity"]),
    ],
)
def test_what_cannot_be_answered_or_judged_is_refused(bench: Bench, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        bench.plan(*overrides)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


def test_the_best_checkpoint_is_the_most_accurate_or_the_least_surprised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": (0.5, 2.0), "b": (0.75, 3.0), "c": (0.25, 1.0)}
    folders = [Folder(str(tmp_path / name)) for name in values]
    for folder, (accuracy, entropy) in zip(folders, values.values(), strict=True):
        position = checkpoint.Position(1, 1, {"eval/accuracy": accuracy, "eval/cross_entropy": entropy})
        folder.write(checkpoint.PROGRESS, json.dumps(position.__dict__).encode())
    monkeypatch.setattr(checkpoint, "kept", lambda run: folders)
    chosen = [checkpoint.best(Folder(str(tmp_path)), metric) for metric in ("eval/accuracy", "eval/cross_entropy")]
    assert [f.root.rpartition("/")[2] for f in chosen if f] == ["b", "c"]


@pytest.mark.slow
def test_a_run_of_two_workers_measures_it_at_every_evaluation_and_keeps_the_best(tmp_path: Path, ray_session: str) -> None:
    home = tiny_pair(tmp_path, rows=40)
    recipe = {
        "name": "answers",
        "student": str(home / "student"),
        "strategy": "cross-entropy",
        "endpoints": {"verifier": {"engine": "verifier", "kind": "callable", "function": "tests.orchestrator.verdicts:right"}},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 64},
        "train": {"steps": 4, "batch_rows": 8, "workers": 2, "layout": "ddp"},
        "evaluate": {"every_steps": 2, "answers": {"rows": 6, "max_new_tokens": 8}},
        "checkpoint": {"every_steps": 2, "best_metric": "eval/accuracy"},
    }
    result = distill(recipe, cluster=cluster(home))
    lines = [json.loads(line)["values"] for line in (home / "runs" / "answers" / "metrics.jsonl").read_text().splitlines()]
    assert [(v["eval/accuracy"], v["eval/judged"]) for v in lines if "eval/accuracy" in v] == [(1.0, 1.0)] * 2
    assert result.metrics["eval/accuracy"] == 1.0
