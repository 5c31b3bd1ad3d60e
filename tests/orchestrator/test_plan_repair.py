"""The door for runs in which mistakes are mended."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from transformers import AutoTokenizer

from cluster.config import FakeEndpoint
from cluster.endpoints import make_engine
from cluster.engines import openai_client
from cluster.engines.fake_server import FakeServer
from orchestrator.config import load_job
from orchestrator.errors import Refusal
from orchestrator.plan import plan_text
from orchestrator.rollouts import equipped, longest_rows
from strategies.core import Strategy
from strategies.stages.repair import Repair
from tests.orchestrator.bench import Bench

MENDS = (
    "strategy=personalised",
    "strategy.max_new_tokens=8",
    r'strategy.feedback="\n\nWrong.\n"',
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


def test_feedback_is_taken_as_it_is_or_as_the_users_turn(bench: Bench) -> None:
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
    assert "verifier 2 x" in said and "teacher 1 x" in said  # attempts and repairs are judged in actors of their own


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(openai_client, "sleep", lambda seconds: None)
    with FakeServer(make_engine(FakeEndpoint(engine="fake", vocabulary=512))) as running:
        yield running


def test_a_server_that_only_writes_may_mend(bench: Bench, server: FakeServer) -> None:
    server.behaviour.dialect = "none"
    given = {"engine": "openai", "base_url": server.url, "model": "fake", "vocabulary": 512}
    bench.recipe["endpoints"]["teacher"] = given
    said = " ".join(plan_text(bench.plan(*MENDS)).split())
    assert f"teacher (openai, 1 actor) fake at {server.url}" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("endpoints.teacher={engine: verifier, kind: exact}",), ["endpoints.teacher.engine", "'verifier', which does not write text"]),
        (("strategy.verifier=teacher",), ["endpoint 'teacher'", "one that judges"]),
        (("strategy.feedback=",), ["feedback"]),
    ],
)
def test_who_cannot_do_what_is_asked_is_refused(bench: Bench, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        bench.plan(*MENDS, *overrides)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)
