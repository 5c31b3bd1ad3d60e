"""Two spaces and two tokenizers in a whole run: states travel with the rows, and filters are not exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from orchestrator.run import distill
from tests.tiny import source_text, tiny_model, tiny_tokenizer

STEPS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dskd")
    for name, vocabulary, width, seed in (("student", 512, 32, 0), ("far", 400, 48, 2)):
        tokenizer = tiny_tokenizer(folder / name, vocabulary)
        tiny_model(folder / name, vocab_size=len(tokenizer), width=width, seed=seed)
    lines = [line for line in source_text().splitlines() if len(line) > 20][:160]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def run(home: Path, name: str, strategy: dict[str, Any], train: dict[str, Any]) -> list[dict[str, float]]:
    """Metrics of every step and of the last evaluation."""
    recipe = {
        "name": name,
        "student": str(home / "student"),
        "strategy": {"teacher": "far", **strategy},
        "endpoints": {"far": {"model": str(home / "far")}},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 3e-3, "micro_batch_tokens": 128, **train},
    }
    distill(recipe, cluster={"storage": str(home / "runs"), "address": "auto"})
    lines = (home / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["values"] for line in lines]


@pytest.mark.slow
def test_states_travel_and_filters_stay_behind(home: Path, ray_session: str) -> None:
    found = run(home, "one", {"type": "dskd", "filters_lr": 1e-2}, {"layout": "single"})
    steps = [values for values in found if "loss" in values]
    assert len(steps) == STEPS
    for term in ("task", "ce"):  # the teacher knows nothing, so its own space has little to say
        assert steps[-1][f"loss/{term}"] < steps[0][f"loss/{term}"], term
    assert steps[0]["score_seconds/far"] > 0 and found[-1]["eval/cross_entropy"] > 0
    weights = load_file(home / "runs" / "one" / "student" / "model.safetensors")
    assert weights and not any("filters" in name for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_workers_learn_what_one_does(home: Path, ray_session: str, layout: str) -> None:
    strategy = {"type": "dskd", "filters_lr": 1e-2}
    one, two = (
        [values["loss"] for values in run(home, f"{layout}-{n}", strategy, more) if "loss" in values]
        for n, more in ((1, {"layout": "single"}), (2, {"layout": layout, "workers": 2}))
    )
    assert two == pytest.approx(one, rel=1e-4)
