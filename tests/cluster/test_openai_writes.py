"""A model behind a URL writes what the same model here does, in ids or in text, and needs no scores for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cluster.answers import mixed_keys
from cluster.config import FakeEndpoint, OpenAIEndpoint, TransformersEndpoint
from cluster.endpoints import check_written, make_engine, probe, probe_writer
from cluster.engines import Columns, Writer
from cluster.engines.fake_server import Behaviour, FakeServer
from cluster.engines.openai_client import ServerFailed
from cluster.engines.openai_manners import Answer, NotWritten, read_answer
from cluster.engines.openai_write import SEED_BITS, Pen, prompt_text
from cluster.offers import Unfit
from strategies.core import Sampling
from tests.cluster.test_writers import bundle, texts
from tests.tiny import tiny_model, tiny_tokenizer

VOCABULARY = 512
ENDS, TURN = 0, 2
"""Ids of `<|endoftext|>` and `<|im_end|>`."""
DRAWN = Sampling(samples=3, temperature=1.0, max_new_tokens=6, seed=5, stop=(ENDS,))
SPEAKS = ["ids", "answers-text", "text"]
MANNERS = {"ids": "prompts as ids", "answers-text": "prompts as ids", "text": "prompts as text, generation_config"}
Served = Callable[..., tuple[OpenAIEndpoint, FakeServer]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer."""
    path = tmp_path_factory.mktemp("author")
    tiny_tokenizer(path)
    tiny_model(path, seed=3, tied=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast) -> Columns:
    words = ["def f(x):", "return", "class Parser:\n    def", "<|im_start|>user\nparse<|im_end|>\n<|im_start|>assistant\n"]
    return bundle([tokenizer(w)["input_ids"] for w in words], [7, 2, 9, 4])


def fake() -> Writer:
    engine = make_engine(FakeEndpoint(engine="fake", vocabulary=VOCABULARY))
    assert isinstance(engine, Writer)
    return engine


@pytest.fixture
def served(request: pytest.FixtureRequest, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Served:
    """Starts servers that score nothing; gives the endpoint of each. Settings of the endpoint go into `endpoint`."""

    def start(engine: Any = None, endpoint: dict[str, Any] | None = None, **behaviour: Any) -> tuple[OpenAIEndpoint, FakeServer]:
        how = Behaviour(**{"dialect": "none", **behaviour})
        server = FakeServer(engine or fake(), behaviour=how, tokenizer=tokenizer).start()
        request.addfinalizer(server.stop)
        given = {"engine": "openai", "base_url": server.url, "model": "fake", "vocabulary": VOCABULARY, "tokenizer": str(folder)}
        return OpenAIEndpoint(**{**given, **(endpoint or {})}), server

    return start


def writer(config: OpenAIEndpoint, usable: int | None = None) -> Writer:
    engine = make_engine(config, usable)
    assert isinstance(engine, Writer)
    return engine


def expected(columns: Columns, sampling: Sampling) -> tuple[list[list[int]], list[float]]:
    """What the fake engine writes when it is asked as its server is: text by text, as row 0, by a seed of the text's own."""
    found: list[list[int]] = []
    logprobs: list[float] = []
    for row, prompt in zip(columns["row_id"].tolist(), texts(columns), strict=True):
        for sample in range(sampling.samples):
            seed = int(mixed_keys(sampling.seed, np.asarray([row]), np.asarray([sample]))[0]) & SEED_BITS
            one = fake().write(bundle([prompt], [0]), Sampling(**{**vars(sampling), "samples": 1, "seed": seed}))
            found.append(one["tokens"].tolist())
            logprobs += one["logprobs"].tolist()
    return found, logprobs


def test_ids_of_a_server_are_taken_as_they_are(served: Served, prompts: Columns) -> None:
    config, server = served(endpoint={"tokenizer": None})
    written = writer(config).write(prompts, DRAWN)
    check_written(prompts, written, 3, VOCABULARY)
    ids, logprobs = expected(prompts, DRAWN)
    assert texts(written) == ids and written["logprobs"].tolist() == logprobs
    assert written["row_id"].tolist() == [r for r in (7, 2, 9, 4) for _ in range(3)] and written["sample"].tolist() == [0, 1, 2] * 4
    assert written["finished"].tolist() == [int(t[-1] == ENDS) for t in ids]
    sent = [body for body in server.requests if body["max_tokens"] == 6]
    assert len(sent) == 12 and len({body["seed"] for body in sent}) == 12 and not any("n" in body for body in sent)
    assert {(body["stop_token_ids"][0], body["repetition_penalty"], body["top_k"]) for body in sent} == {(ENDS, 1.0, -1)}


@pytest.mark.parametrize("speaks", ["answers-text", "text"])
def test_texts_without_ids_are_what_the_tokenizer_makes_of_them(
    served: Served, prompts: Columns, tokenizer: PreTrainedTokenizerFast, speaks: str
) -> None:
    config, server = served(speaks=speaks)
    written = writer(config).write(prompts, DRAWN)
    check_written(prompts, written, 3, VOCABULARY)
    for row, (ids, got, finished) in enumerate(zip(expected(prompts, DRAWN)[0], texts(written), written["finished"], strict=True)):
        ended, words = ids[-1] == ENDS, tokenizer.decode(ids, skip_special_tokens=True)
        own = tokenizer(words if ended else words.rstrip("\ufffd"), add_special_tokens=False)["input_ids"] + [ENDS] * ended
        assert got == own[:6], row
        assert finished == (ended and len(own) <= 6)
    assert np.isnan(written["logprobs"]).all()
    if speaks == "text":
        asked = [str(request["prompt"]) for request in server.requests]
        assert any(prompt.startswith("<|im_start|>user\nparse") for prompt in asked)  # special tokens are part of a prompt


@pytest.mark.parametrize("speaks", SPEAKS)
def test_a_served_network_writes_greedily_what_it_writes_here(
    served: Served, folder: Path, prompts: Columns, tokenizer: PreTrainedTokenizerFast, speaks: str
) -> None:
    here = make_engine(TransformersEndpoint(model=str(folder)), threads=1)
    assert isinstance(here, Writer)
    sampling = Sampling(max_new_tokens=8, stop=(ENDS, TURN), samples=2)
    config, server = served(here, speaks=speaks)
    written, ours = writer(config).write(prompts, sampling), here.write(prompts, sampling)
    words = [[tokenizer.decode(t, skip_special_tokens=True).rstrip("\ufffd") for t in texts(w)] for w in (written, ours)]
    assert len(words[0]) == 8 and [a for a, b in zip(*words, strict=True) if not b.startswith(a)] == []
    assert len([b for b in server.requests if b["max_tokens"] == 8]) == 4  # two alike are asked for once
    if speaks == "ids":
        assert texts(written) == texts(ours)
        np.testing.assert_allclose(written["logprobs"], ours["logprobs"], atol=1e-4)


def test_a_text_belongs_to_its_row_and_sample_and_not_to_its_bundle(served: Served, prompts: Columns) -> None:
    engine = writer(served(seconds=0.02)[0])
    whole = texts(engine.write(prompts, DRAWN))
    some = texts(prompts)
    assert texts(engine.write(bundle([some[2], some[1]], [9, 2]), DRAWN)) == whole[6:9] + whole[3:6]
    assert texts(engine.write(prompts, Sampling(**{**vars(DRAWN), "seed": 6}))) != whole


# what is made of an answer


def test_a_row_may_have_a_limit_of_its_own(served: Served, prompts: Columns) -> None:
    config, _ = served()
    limits = np.arange(1, 1 + len(prompts["lengths"]), dtype=np.int32)
    written = writer(config).write({**prompts, "max_new_tokens": limits}, Sampling(samples=2, temperature=1.0, max_new_tokens=3))
    assert (written["lengths"] <= np.repeat(np.minimum(limits, 3), 2)).all() and written["lengths"][:2].tolist() == [1, 1]


@pytest.fixture
def pen(served: Served) -> Pen:
    config, _ = served(speaks="text")
    engine: Any = writer(config)
    found: Pen = engine._pen
    return found


def said(text: str = "", ids: list[int] | None = None, ended: bool = True, stop: int | None = None) -> Answer:
    return Answer(text, ids, [-1.0] * len(ids or ()), ended, stop, 0, 0)


@pytest.mark.parametrize(
    ("answer", "prompt", "tokens", "finished"),
    [
        (said(ids=[9, 8, ENDS]), [5], [9, 8, ENDS], True),
        (said(ids=[9, 8]), [5], [9, 8, ENDS], True),  # a server that does not tell its stop
        (said(ids=[9, 8], stop=TURN), [5], [9, 8, TURN], True),
        (said(ids=[9, 8]), [5, TURN, 6], [9, 8, TURN], True),  # turns of the prompt end so
        (said(ids=[9, 8, TURN, 7, 6]), [5], [9, 8, TURN], True),
        (said(ids=[9, 8], ended=False), [5], [9, 8], False),
        (said(ids=[9, 600, 8]), [5], [9], False),  # no id of the student's
        (said(ids=[9, 9, 9, 9, 9, 9, 9]), [5], [9] * 6, False),
        (said(ids=[9, 9, 9, 9, 9, 9]), [5], [9] * 6, False),  # no room for its end
        (said(ids=[], ended=False), [5], [], False),
    ],
)
def test_a_text_ends_where_it_must(pen: Pen, answer: Answer, prompt: list[int], tokens: list[int], finished: bool) -> None:
    text = pen._text(answer, prompt, (ENDS, TURN), 6)
    assert (text.tokens.tolist(), text.finished) == (tokens, finished)
    told = len(answer.ids or ())
    assert [math.isnan(v) for v in text.logprobs] == [n >= told for n in range(len(tokens))]


def test_a_text_ends_at_a_stop_in_its_words_and_loses_half_a_character(pen: Pen, tokenizer: PreTrainedTokenizerFast) -> None:
    stop = (ENDS, TURN)
    own = tokenizer("return x")["input_ids"]
    assert pen._text(said("return x<|im_end|>\n<|im_start|>user"), [5], stop, 20).tokens.tolist() == [*own, TURN]
    cut = pen._text(said("return x\ufffd", ended=False), [5], stop, 20)
    assert (cut.tokens.tolist(), cut.finished) == (own, False)


def test_a_prompt_goes_without_the_token_that_the_server_puts_before_it(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("<|im_start|>user<|im_end|>")["input_ids"]
    assert prompt_text(tokenizer, ids) == "<|im_start|>user<|im_end|>"

    class Begins:
        bos_token, bos_token_id = "<|im_start|>", ids[0]

        def decode(self, *given: Any, **settings: Any) -> str:
            return str(tokenizer.decode(*given, **settings))

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ids[0], *tokenizer(text)["input_ids"]]}

    assert prompt_text(Begins(), ids) == "user<|im_end|>"  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"text": None}]}, {"choices": "x"}])
def test_an_answer_without_a_text_is_none(answer: dict[str, Any]) -> None:
    with pytest.raises(NotWritten, match="no text in its first choice"):
        read_answer(answer)


def test_log_probabilities_of_other_tokens_are_not_taken() -> None:
    choice = {"text": "a", "token_ids": [1, 2, 3], "logprobs": {"token_logprobs": [-1.0, None, -3.0]}}
    known = read_answer({"choices": [choice]}).logprobs
    assert (known[0], known[2]) == (-1.0, -3.0) and math.isnan(known[1])
    choice["logprobs"] = {"token_logprobs": [-1.0]}
    assert all(map(math.isnan, read_answer({"choices": [choice]}).logprobs))


# the door and faults


@pytest.mark.parametrize("speaks", SPEAKS)
def test_a_server_without_scores_may_write_and_not_score(served: Served, speaks: str) -> None:
    config, server = served(speaks=speaks, context_tokens=4096)
    offer = probe_writer(config)
    assert offer is not None and offer.line == f"fake at {server.url} ({MANNERS[speaks]}), 4,096 tokens of prompt and text"
    with pytest.raises(Unfit, match="does not score the token ids of a prompt"):
        probe(config)


@pytest.mark.parametrize("speaks", SPEAKS)
def test_a_server_of_openais_settings_alone_is_asked_with_them(served: Served, prompts: Columns, speaks: str) -> None:
    config, server = served(speaks=speaks, refuses=("top_k", "generation_config"))
    offer = probe_writer(config)
    assert offer is not None and offer.manner.endswith("OpenAI's settings alone")
    check_written(prompts, writer(config).write(prompts, DRAWN), 3, VOCABULARY)
    wanted = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "frequency_penalty"}
    assert set(server.requests[-1]) == wanted
    with pytest.raises(Unfit, match=r"knows no top_k.*draws from 4 ids.*strategy\.top_k=0"):
        writer(config).write(prompts, Sampling(**{**vars(DRAWN), "top_k": 4}))


def test_nobody_else_is_asked() -> None:
    assert probe_writer(FakeEndpoint(engine="fake", vocabulary=9)) is None
    assert probe_writer(TransformersEndpoint(model="x/y")) is None


@pytest.mark.parametrize(
    ("behaviour", "endpoint", "words"),
    [
        ({"speaks": "nothing"}, {}, ["base_url", "does not write", "asked with prompts as ids: status 400", "transformers serve"]),
        ({}, {"model": "other"}, ["model", "'other'", "one of its models: fake"]),
        ({"broken": 99}, {}, ["status 500 after 3 tries", "the engine is broken"]),
        ({}, {"base_url": "http://127.0.0.1:9/v1"}, ["no answer after 3 tries", "ConnectError", "Start the server"]),
        ({}, {"base_url": "http://10.0.0.1/v1", "api_key_env": "NO_SUCH_KEY"}, ["api_key_env", "NO_SUCH_KEY", "Export"]),
    ],
)
def test_a_server_that_cannot_write_is_refused(
    served: Served, naps: list[float], behaviour: dict[str, Any], endpoint: dict[str, Any], words: list[str]
) -> None:
    config, _ = served(endpoint=endpoint, **behaviour)
    with pytest.raises(Unfit) as caught:
        probe_writer(config)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_a_server_that_speaks_text_needs_a_tokenizer(served: Served, folder: Path, prompts: Columns) -> None:
    config, _ = served(speaks="text", endpoint={"tokenizer": None})
    with pytest.raises(Unfit, match=r"tokenizer: got none, for a server that speaks text"):
        writer(config).write(prompts, DRAWN)
    given = config.with_tokenizer(str(folder))
    assert isinstance(given, OpenAIEndpoint) and given.identity == config.identity
    assert len(texts(writer(given).write(prompts, DRAWN))) == 12
    assert given.with_tokenizer("/elsewhere") == given
    other = FakeEndpoint(engine="fake", vocabulary=9)
    assert other.with_tokenizer(str(folder)) == other


def test_a_busy_and_a_broken_server_are_asked_again(served: Served, naps: list[float], prompts: Columns) -> None:
    config, server = served()
    engine = writer(config)
    engine.write(bundle([[5]]), DRAWN)
    server.behaviour.busy, server.behaviour.retry_after, server.behaviour.broken = 2, "7", 1
    assert texts(engine.write(prompts, DRAWN)) == expected(prompts, DRAWN)[0]
    assert sorted(naps)[1:] == [7.0, 7.0] and len(naps) == 3


def test_a_server_that_stays_broken_is_named(served: Served, naps: list[float], prompts: Columns) -> None:
    config, server = served(endpoint={"max_retries": 1})
    engine = writer(config)
    engine.write(bundle([[5]]), DRAWN)
    server.behaviour.broken = 99
    with pytest.raises(ServerFailed, match="status 500 after 2 tries"):
        engine.write(prompts, DRAWN)


def test_prompts_and_texts_are_paid_for(served: Served, prompts: Columns) -> None:
    config, _ = served(endpoint={"price_per_million_tokens": 250_000.0, "price_per_million_written_tokens": 500_000.0})
    written = writer(config).write(prompts, DRAWN)
    check_written(prompts, written, 3, VOCABULARY)
    assert written["cost"].tolist() == [3 * len(prompts["tokens"]) / 4 + len(written["tokens"]) / 2]
    assert "cost" not in writer(served()[0]).write(prompts, DRAWN)


def test_an_empty_prompt_is_refused(served: Served) -> None:
    with pytest.raises(ValueError, match="expected at least one token"):
        writer(served()[0]).write(bundle([[3], []]), DRAWN)
