"""The door for runs in which mistakes are mended."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from orchestrator.config import load_job
from orchestrator.plan import plan_text
from orchestrator.rollouts import equipped, longest_rows
from strategies.core import Strategy
from strategies.stages.repair import Repair
from tests.orchestrator.bench import Bench

MENDS = (
    "strategy=personalised",
    "strategy.max_new_tokens=8",
    "strategy.feedback=Wrong.",
    "endpoints.verifier={engine: verifier, kind: exact}",
)
TURN = "<|im_end|>\n<|im_start|>user\nWrong.<|im_end|>\n<|im_start|>assistant\n"


def mended(bench: Bench, *overrides: str) -> Strategy:
    job = load_job(bench.recipe, (*MENDS, *overrides), bench.cluster)
    return equipped(job, job.run.strategy.build(), AutoTokenizer.from_pretrained(job.run.student.model))


def feedback(bench: Bench) -> str:
    """What is said between a wrong attempt and its repair, in words."""
    (stage,) = (s for s in mended(bench).stages if isinstance(s, Repair))
    assert stage.sampling.stop and stage.longest_tokens == 64
    return str(AutoTokenizer.from_pretrained(bench.recipe["student"]["model"]).decode(list(stage.feedback)))


def test_feedback_stands_on_lines_of_its_own_or_is_the_users_turn(bench: Bench) -> None:
    bench.recipe["data"]["train"] = bench.rows({"prompt": "a", "completion": "b"})
    assert feedback(bench) == "\n\nWrong.\n"
    bench.recipe["data"]["train"] = bench.rows({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert feedback(bench) == TURN


@pytest.mark.parametrize(("variant", "rows"), [("direct", [26, 64]), ("combine", [26, 26, 64, 64])])
def test_estimates_know_the_longest_lessons(bench: Bench, variant: str, rows: list[int]) -> None:
    strategy = mended(bench, f"strategy.variant={variant}")
    (stage,) = (s for s in strategy.stages if isinstance(s, Repair))
    longest = longest_rows(strategy, np.asarray([10, 60]))
    assert longest.tolist() == [r + (len(stage.feedback) if r == 26 else 0) for r in rows]


def test_the_plan_says_who_mends(bench: Bench) -> None:
    plan = bench.plan(*MENDS, "baseline=true")
    said = " ".join(plan_text(plan).split())
    assert "Rollout(student) -> Reward(verifier) -> Repair(teacher) -> Reward(verifier) -> Lessons" in said
    assert "teacher mends what is wrong of it in up to 8 tokens" in said and "trains the same again" not in said
