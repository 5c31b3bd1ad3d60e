"""A teacher behind a URL at the door: what its server cannot give is said before anything is prepared or loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cluster.config import FakeEndpoint
from cluster.endpoints import make_engine
from cluster.engines import openai_client
from cluster.engines.fake_server import FakeServer
from orchestrator.errors import Refusal
from orchestrator.plan import plan_text
from strategies.stages.view import behind as shown_more
from tests.orchestrator.bench import Bench, both, files, machine_of, other_ids, put


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(openai_client, "sleep", lambda seconds: None)
    with FakeServer(make_engine(FakeEndpoint(engine="fake", vocabulary=512))) as running:
        yield running


@pytest.fixture
def behind(bench: Bench, server: FakeServer) -> Bench:
    """The good recipe with its teacher behind a URL."""
    machine_of()(bench)
    server.behaviour.context_tokens = 4096
    given = {"engine": "openai", "base_url": server.url, "model": "fake", "vocabulary": 512, "tokenizer": str(bench.folder / "teacher")}
    put("endpoints.teacher", given)(bench)
    return bench


def having(**behaviour: Any) -> Callable[[Bench, FakeServer], None]:
    def change(bench: Bench, server: FakeServer) -> None:
        for name, value in behaviour.items():
            setattr(server.behaviour, name, value)

    return change


def recipe(change: Callable[[Bench], None]) -> Callable[[Bench, FakeServer], None]:
    return lambda bench, server: change(bench)


def endpoint(**settings: Any) -> Callable[[Bench, FakeServer], None]:
    return recipe(both(*(put(f"endpoints.teacher.{name}", value) for name, value in settings.items())))


def foreign_tokenizer(bench: Bench, server: FakeServer) -> None:
    own = bench.copy("teacher", "other")
    other_ids(own)
    put("endpoints.teacher.tokenizer", str(own))(bench)


def terms(take: str) -> Callable[[Bench, FakeServer], None]:
    signal = {"one": {"endpoint": "teacher", "take": take}}
    return recipe(put("strategy", {"type": "terms", "signals": signal, "terms": [{"objective": "forward-kl", "signal": "one"}]}))


CASES: list[tuple[str, Callable[[Bench, FakeServer], None], list[str]]] = [
    (
        "nobody there",
        endpoint(base_url="http://127.0.0.1:9/v1"),
        ["endpoints.teacher.base_url", "no answer after 3 tries", "Start the server"],
    ),
    ("no address", endpoint(base_url="vllm"), ["endpoints.teacher.base_url", "'vllm'", "http://"]),
    ("no key", endpoint(base_url="http://h.example/v1", api_key_env="NO_KEY"), ["endpoints.teacher.api_key_env", "NO_KEY", "Export"]),
    ("unlisted model", endpoint(model="fkae"), ["endpoints.teacher.model", "'fkae'", "one of its models: fake"]),
    ("no scores", having(dialect="none"), ["endpoints.teacher.base_url", "no prompt_logprobs", "vllm serve"]),
    ("scores by text", having(dialect="text"), ["named by their text", "token_id:123"]),
    ("fewer ids", having(max_top_k=5), ["gives 5 ids of a token", "the 8 of top_k", "top_k to at most 5"]),
    ("short context", having(context_tokens=20), ["data.max_length_tokens", "at most the 19", "endpoints.teacher", "=19 or less"]),
    ("whole distributions", terms("dense"), ["endpoints.teacher.engine", "'dense'", "per-token or topk", "saved model"]),
    ("hidden states", terms("hidden"), ["take hidden", "without a network"]),
    ("other tokens", foreign_tokenizer, ["tokenizer of endpoint 'teacher'", "2 tokens with other ids"]),
    ("no tokenizer there", endpoint(tokenizer="/nowhere/x"), ["endpoints.teacher.tokenizer", "'/nowhere/x'", "Name the folder"]),
    ("few ids", endpoint(vocabulary=100), ["vocabulary of endpoint 'teacher'", "100 ids"]),
    ("broken", having(broken=99), ["endpoints.teacher.base_url", "status 500 after 3 tries", "the engine is broken"]),
]


@pytest.mark.parametrize(("spoil", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_server_that_cannot_teach_is_refused_in_words(
    behind: Bench, server: FakeServer, spoil: Callable[[Bench, FakeServer], None], words: list[str]
) -> None:
    spoil(behind, server)
    with pytest.raises(Refusal) as caught:
        behind.plan()
    refusal = caught.value
    assert [word for word in words if word not in str(refusal)] == [], str(refusal)
    assert all((refusal.where, refusal.got, refusal.expected, refusal.do))
    assert len(str(refusal)) < 900 and "\n" not in str(refusal)
    assert {path for path in files(behind.storage) if path.split("/")[0] != "data"} == set()


def test_a_good_server_is_described_in_a_line(behind: Bench, server: FakeServer) -> None:
    plan = behind.plan()
    assert plan.warnings == ()
    said = " ".join(plan_text(plan).split())
    assert f"teacher (openai, 1 actor) fake at {server.url} (prompt_logprobs), at least top-8, rows up to 4,095 tokens" in said


def test_what_a_server_does_not_tell_is_trusted_with_a_warning(behind: Bench, server: FakeServer) -> None:
    put("endpoints.teacher.tokenizer", None)(behind)
    server.behaviour.context_tokens = None
    tokenizer, context = behind.plan().warnings
    assert tokenizer == "endpoint 'teacher' names no tokenizer; its model is taken to share the student's."
    assert context.startswith("the server of endpoint 'teacher' does not tell its context")


def test_a_busy_server_is_waited_for(behind: Bench, server: FakeServer) -> None:
    server.behaviour.busy = 2
    assert behind.plan().offers["teacher"].top_k == 8


def reading_more(bench: Bench, server: FakeServer, tokens: int | None) -> None:
    """The teacher behind the URL reads a solution before every row, and has a context of so many `tokens`."""
    server.behaviour.context_tokens = tokens
    served = bench.recipe["endpoints"].pop("teacher")
    both(put("strategy", {"type": "opsd", "max_new_tokens": 16}), put("endpoints.self", served))(bench)


def test_a_server_is_never_sent_a_row_that_is_too_long_behind_its_context(behind: Bench, server: FakeServer) -> None:
    reading_more(behind, server, 101)
    plan = behind.plan()
    (stage,) = shown_more(plan.strategy.stages)
    room, context = 101 - 1, stage.context
    assert context.longest_tokens == room
    fixed = len(context.before) + len(context.between)
    row = np.ones(room - fixed - 10, np.int32)
    whole = context.row(row, row[:10])
    assert whole is not None and len(whole) == room and context.row(row, row[:11]) is None


def test_of_a_server_that_does_not_tell_the_longest_row_behind_a_context_is_said(behind: Bench, server: FakeServer) -> None:
    reading_more(behind, server, None)
    plan = behind.plan()
    (stage,) = shown_more(plan.strategy.stages)
    fixed = len(stage.context.before) + len(stage.context.between)
    assert f"it reads rows of up to {2 * 64 + fixed} tokens." in " ".join(plan.warnings)


def test_a_context_that_leaves_no_room_is_refused(behind: Bench, server: FakeServer) -> None:
    reading_more(behind, server, 101)
    put("strategy.context", "Look here. " * 100)(behind)
    with pytest.raises(Refusal, match=r"strategy.context: got .* tokens; expected fewer than the 100 that endpoints.self reads"):
        behind.plan()
