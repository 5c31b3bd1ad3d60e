"""Two teachers, one with a tokenizer of its own, a mixture that follows the gap to each, and rows that the student writes: in one run."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.run import distill
from tests.tiny import source_text, tiny_model, tiny_tokenizer

STEPS, EVERY, KILLED_AT = 16, 4, 10


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    for name, vocabulary, width, seed in (("student", 512, 32, 0), ("near", 512, 48, 1), ("far", 400, 48, 2)):
        tokenizer = tiny_tokenizer(folder / name, vocabulary)
        tiny_model(folder / name, vocab_size=len(tokenizer), width=width, seed=seed)
    lines = [line for line in source_text().splitlines() if len(line) > 20][:240]
    for domain, part in (("code", lines[::2]), ("prose", lines[1::2])):
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    return folder


def run(home: Path, name: str) -> list[dict[str, Any]]:
    """The journal's lines of a run: each step's and each evaluation's."""
    recipe = {
        "name": name,
        "student": str(home / "student"),
        "strategy": {
            "type": "multi-teacher",
            "teachers": {"near": {"domains": ["code"]}},
            "foreign": {"far": {"domains": ["prose"]}},
            "take": {"type": "topk", "top_k": 8},
            "student_share": 0.5,
            "max_new_tokens": 8,
            "prompt_tokens": 4,
            "staleness": 1,
        },
        "curriculum": {"mixture": {"type": "ddk", "domains": ["code", "prose"], "teacher": {"code": "near", "prose": "far"}}},
        "endpoints": {name: {"model": str(home / name)} for name in ("near", "far")},
        "data": {"train": {d: str(home / f"{d}.jsonl") for d in ("code", "prose")}, "held_out_rows": 24, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 3e-3, "layout": "single"},
        "evaluate": {"every_steps": 2},
        "checkpoint": {"every_steps": EVERY},
    }
    distill(recipe, cluster={"storage": str(home / "runs"), "address": "auto"})
    return [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def steps_of(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    return {line["step"]: line["values"] for line in lines if "loss" in line["values"]}


def kill_at(home: Path, name: str, step: int) -> int:
    """Sends SIGKILL to the training worker once the run has reached `step`; returns its pid."""
    journal, end = home / "runs" / name / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < end:
        if journal.exists() and f'"step": {step},' in journal.read_text():
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
            newest = max(workers, key=lambda p: p.create_time())
            newest.send_signal(signal.SIGKILL)
            return newest.pid
        time.sleep(0.05)
    raise TimeoutError(f"{name} did not reach step {step}")


@pytest.mark.slow
def test_all_of_it_together_is_the_same_after_a_kill(home: Path, ray_session: str) -> None:
    calm = steps_of(run(home, "calm"))
    assert list(calm) == list(range(1, STEPS + 1))
    assert any(0 < s["rollout/share"] < 1 for s in calm.values()) and all("loss/spans-far" in s for s in calm.values())
    shares = {step: (s["control/mixture/code"], s["control/mixture/prose"]) for step, s in calm.items()}
    assert all(sum(pair) == pytest.approx(1) for pair in shares.values()) and len(set(shares.values())) > 2
    with ThreadPoolExecutor(1) as pool:
        pid = pool.submit(kill_at, home, "killed", KILLED_AT)
        killed = steps_of(run(home, "killed"))
        assert pid.result()
    for name in ("loss", "row_id_sum", "control/mixture/code", "taught_tokens/near"):
        assert [s[name] for s in killed.values()] == pytest.approx([s[name] for s in calm.values()], rel=1e-5), name
