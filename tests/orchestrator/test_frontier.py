"""Students that learn at the edge of what they can do: from prompts that they sometimes solve, from mended mistakes, and from pairs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator import rollouts
from strategies.core import Columns, Sampling, ScoreRequest
from tests.harness_rollouts import Loop, Says, make_toy

WANTED = 5


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return make_toy(tmp_path_factory.mktemp("frontier"))


class Mender:
    """Writes the wanted token behind everything, but nothing right behind a question of odd rows."""

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        raise NotImplementedError

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        n = len(columns["lengths"])
        tokens = np.where(columns["row_id"] % 2, WANTED + 1, WANTED).astype(np.int32)
        return {
            "tokens": tokens,
            "lengths": np.ones(n, np.int32),
            "row_id": columns["row_id"],
            "sample": np.zeros(n, np.int32),
            "finished": np.zeros(n, np.uint8),
            "logprobs": np.zeros(n, np.float32),
        }


@pytest.fixture(autouse=True)
def no_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's rows come from nowhere, so nobody can look at them."""
    monkeypatch.setattr(rollouts, "conversations", lambda data: False)


class Right(Says):
    """Finds right what has the token `wanted`, or everything without one. Judges no rows, too."""

    def __init__(self, wanted: int | None = None):
        super().__init__(-1 if wanted is None else wanted)

    def judge(self, columns: Columns) -> Columns:
        rows, none = len(columns["lengths"]), np.zeros(1, np.int64)
        if self.wanted >= 0 and rows:
            return super().judge(columns)
        return {"reward": np.ones(rows, np.float32), "judged": np.ones(rows, np.uint8), "failed": none, "unjudgeable": none}


@pytest.mark.parametrize("variant", ["direct", "combine"])
def test_a_student_learns_what_was_mended_until_it_has_no_faults(toy: Path, variant: str) -> None:
    strategy = {"type": "personalised", "teacher": "mender", "max_new_tokens": 3, "variant": variant}
    loop = Loop(toy, strategy, {"steps": 30, "batch_rows": 16}, mender=Mender(), verifier=Right(WANTED))
    before, found = loop.reward(), loop.train()
    assert before < 0.4 and loop.reward() > 0.75 and found[0]["loss/ce"] > 1


def test_a_step_without_faults_leaves_the_student_as_it_is(toy: Path) -> None:
    strategy = {"type": "personalised", "teacher": "mender", "max_new_tokens": 3}
    loop = Loop(toy, strategy, {"warmup_steps": 0}, mender=Mender(), verifier=Right(WANTED))
    loop.step()
    loop.endpoints["verifier"] = Right()
    metrics, columns = loop.step()
    assert (
        len(columns["lengths"]) == 0
        and columns["count/repair/passed"][0] == columns["rows_total"][0]
        and columns["count/repair/failed"][0] == 0
    )
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0 and metrics["lr"] > 0
    first, second, third = loop.versions
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert any(not torch.equal(first[name], second[name]) for name in second)


def test_prompts_that_are_sometimes_solved_count_most(toy: Path) -> None:
    loop = Loop(toy, {"type": "paced", "samples": 4, "take": {"type": "dense"}}, {"batch_rows": 8}, verifier=Says(WANTED))
    before = loop.divergence()
    _, columns = loop.step()
    assert len(columns["lengths"]) == 32 and 0 < columns["weights/forward"].min() < columns["weights/forward"].max() <= 1
    loop.train()
    assert loop.divergence() < 0.5 * before


def test_preferring_the_teachers_text_leads_to_the_teacher(toy: Path) -> None:
    loop = Loop(toy, {"type": "soda", "sft_weight": 0.2}, {})
    before, found = loop.divergence(), loop.train()
    assert found[0]["loss/dpo"] == pytest.approx(math.log(2), rel=1e-5) and found[-1]["loss/dpo"] < 0.2
    assert loop.divergence() < before and found[-1]["loss/rejected"] > found[-1]["loss/chosen"]
