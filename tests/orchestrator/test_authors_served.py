"""A teacher behind a URL that writes: asked for text and not for scores at the door, and read into rows like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.config import FakeEndpoint, OpenAIEndpoint
from cluster.endpoints import make_engine
from cluster.engines import Writer, openai_client
from cluster.engines.fake_server import Behaviour, FakeServer
from orchestrator.errors import Refusal
from orchestrator.models import load_tokenizer
from orchestrator.plan import plan_text
from strategies.core import Sampling
from tests.cluster.test_writers import bundle, texts
from tests.orchestrator.bench import Bench, both, data_of, machine_of, put
from tests.orchestrator.test_authored import PROMPTS, fill_here, questions, rows_of


@pytest.fixture
def server(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """It takes and gives text, and no scores."""
    monkeypatch.setattr(openai_client, "sleep", lambda seconds: None)
    how = Behaviour(dialect="none", speaks="text", context_tokens=4096)
    engine = make_engine(FakeEndpoint(engine="fake", vocabulary=512))
    with FakeServer(engine, behaviour=how, tokenizer=load_tokenizer(bench.job().run.student)) as running:
        yield running


@pytest.fixture
def asking(bench: Bench, server: FakeServer) -> Bench:
    given = {"engine": "openai", "base_url": server.url, "model": "fake", "vocabulary": 512, "price_per_million_written_tokens": 1e6}
    both(machine_of(), data_of(*questions()), put("strategy", {"type": "seq-kd", "max_new_tokens": 12}))(bench)
    both(put("text", {"part_prompts": 8}), put("endpoints.teacher", given), put("data.held_out_rows", 4))(bench)
    return bench


def test_texts_of_a_server_become_rows_in_the_students_ids(asking: Bench, server: FakeServer) -> None:
    author = server.engine
    plan = asking.plan()
    (job,) = plan.writings()
    assert (
        isinstance(author, Writer)
        and isinstance(job.config, OpenAIEndpoint)
        and plan.text is not None
        and job.config.tokenizer == plan.text.prompts.tokenizer_folder
    )
    fill_here(job)
    asked = len(server.requests)
    again = asking.plan()
    assert again.writings() == [] and len(server.requests) == asked  # a finished store asks no server
    assert again.text is not None and again.text.selected is not None and again.text.offers == {}
    kept = rows_of(again.text.selected.rows_file) + rows_of(again.text.selected.rejected_file)
    assert len(kept) == PROMPTS - 4 and {row["logprob"] for row in kept} == {None}
    tokenizer, stop = again.cast.tokenizer, again.text.stores[0].authored.write.sampling.stop
    for row in rows_of(again.text.selected.rows_file):
        first = row["loss_mask"].index(1)
        ids = texts(author.write(bundle([row["tokens"][:first]]), Sampling(max_new_tokens=12, stop=stop)))[0]
        words, ended = tokenizer.decode(ids, skip_special_tokens=True), ids[-1] in stop
        own = tokenizer(words if ended else words.rstrip("\ufffd"), add_special_tokens=False)["input_ids"] + [stop[0]] * ended
        assert row["tokens"][first:] == own[:12]
    assert sum(part.cost for part in again.text.stores[0].files.parts) >= PROMPTS - 4  # a token costs 1, and each text has one at least


def test_the_door_asks_a_writer_for_text_alone(asking: Bench, server: FakeServer) -> None:
    plan = asking.plan()
    assert plan.warnings == ("endpoint 'teacher' names no tokenizer; its model is taken to share the student's.",)
    said = " ".join(plan_text(plan).split())
    offer = f"fake at {server.url} (prompts as text, generation_config), 4,096 tokens of prompt and text"
    assert f"teacher (openai, writes) {offer}" in said
    assert not any("prompt_logprobs" in body or body.get("echo") for body in server.requests)
    server.behaviour.context_tokens = None
    assert "the server of endpoint 'teacher' does not tell its context." in asking.plan().warnings


CASES: list[tuple[str, dict[str, Any], Callable[[Bench], None], list[str]]] = [
    ("nobody there", {}, put("endpoints.teacher.base_url", "http://127.0.0.1:9/v1"), ["endpoints.teacher.base_url", "Start the server"]),
    ("it does not write", {"speaks": "nothing"}, put("seed", 1), ["endpoints.teacher.base_url", "does not write"]),
    ("unlisted model", {}, put("endpoints.teacher.model", "fkae"), ["endpoints.teacher.model", "'fkae'", "one of its models: fake"]),
    ("short context", {"context_tokens": 20}, put("seed", 1), ["data.max_length_tokens", "12 new ones", "at most the 20", "=20 or less"]),
    (
        "settings that it lacks",
        {"refuses": ("generation_config",)},
        put("strategy", {"type": "verified-cot", "samples": 2, "top_k": 5, "max_new_tokens": 12, "judge": "none"}),
        ["endpoints.teacher.base_url", "knows no top_k", "strategy.top_k=0"],
    ),
    ("scores asked of it", {}, put("strategy", {"type": "logits", "top_k": 8}), ["endpoints.teacher.base_url", "does not score"]),
]


@pytest.mark.parametrize(("behaviour", "change", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_server_that_cannot_write_is_refused_in_words(
    asking: Bench, server: FakeServer, behaviour: dict[str, Any], change: Callable[[Bench], None], words: list[str]
) -> None:
    for name, value in behaviour.items():
        setattr(server.behaviour, name, value)
    change(asking)
    with pytest.raises(Refusal) as caught:
        asking.plan()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert len(str(caught.value)) < 900 and "\n" not in str(caught.value)
