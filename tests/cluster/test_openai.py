"""A model behind a URL scores as the same model here does, and a server that cannot is refused in words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import FakeEndpoint, OpenAIEndpoint, TransformersEndpoint
from cluster.endpoints import check_scores, make_engine, probe
from cluster.engines import Columns, Engine, openai_client
from cluster.engines.fake_server import Behaviour, FakeServer
from cluster.engines.openai import OpenAIEngine
from cluster.engines.openai_calibration import first_rows
from cluster.engines.openai_client import Pace, ServerFailed
from cluster.engines.openai_dialects import Echo, PromptLogprobs, Said
from cluster.offers import Unfit
from strategies.core import ScoreRequest
from tests.cluster.test_engines import bundle
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
VOCABULARY = 512
TOP_K = 7
TOP = ScoreRequest("topk", top_k=TOP_K)
LABELS = ScoreRequest("per-token")
FAKE = make_engine(FakeEndpoint(engine="fake", vocabulary=VOCABULARY))
Served = Callable[..., tuple[OpenAIEndpoint, FakeServer]]


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Served:
    """Starts servers; gives the endpoint of each. Settings of the endpoint go into `endpoint`, all others are the server's behaviour."""

    def start(engine: Any = FAKE, endpoint: dict[str, Any] | None = None, **behaviour: Any) -> tuple[OpenAIEndpoint, FakeServer]:
        server = FakeServer(engine, behaviour=Behaviour(**behaviour)).start()
        request.addfinalizer(server.stop)
        given = {"engine": "openai", "base_url": server.url, "model": "fake", "vocabulary": VOCABULARY, **(endpoint or {})}
        return OpenAIEndpoint(**given), server

    return start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    model = tiny_model(path)
    model.get_input_embeddings().weight.data *= 20  # a fresh model says almost the same of every id, at any temperature
    model.save_pretrained(path)
    return path


def ready(config: OpenAIEndpoint) -> Engine:
    """The engine, whose server was probed."""
    engine = make_engine(config)
    assert isinstance(engine, OpenAIEngine) and engine.offer.top_k == 1
    return engine


def same(theirs: Columns, ours: Columns) -> None:
    for name in ("logprob", "logprobs"):
        if name in ours:
            np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5, rtol=0)
    if "ids" in ours:
        np.testing.assert_array_equal(theirs["ids"], ours["ids"])
    assert set(theirs) == set(ours)


@pytest.mark.parametrize("request_", [TOP, LABELS, ScoreRequest("topk", top_k=VOCABULARY)], ids=["topk", "per-token", "all"])
@pytest.mark.parametrize("dialect", ["vllm", "echo"])
def test_scores_of_a_server_are_those_of_its_engine(served: Served, dialect: str, request_: ScoreRequest) -> None:
    config, _ = served(dialect=dialect)
    columns = bundle([9, 30, 1, 0, 17, 2, 12])
    scores = make_engine(config).score(columns, request_)
    check_scores(columns, scores, request_, VOCABULARY)
    same(scores, FAKE.score(columns, request_))


@pytest.mark.parametrize("dialect", ["vllm", "echo"])
def test_scores_of_a_served_network_are_those_of_the_network_here(served: Served, folder: Path, dialect: str) -> None:
    engine = make_engine(TransformersEndpoint(model=str(folder)))
    config, _ = served(engine, dialect=dialect, endpoint={"local_model": str(folder), "calibration_rows": 2, "max_calibration_error": 1e-5})
    columns = bundle([9, 30, 17, 12])
    same(make_engine(config).score(columns, TOP), engine.score(columns, TOP))


def test_rows_go_as_ids_up_to_their_last_loss_token_at_temperature_1(served: Served) -> None:
    config, server = served()
    engine = ready(config)
    del server.requests[:]
    columns = bundle([6, 5])
    columns["loss_mask"][:] = [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    engine.score(columns, TOP)
    assert server.requests[-1]["prompt"] == columns["tokens"][:4].tolist()
    assert len(server.requests) == 2  # the first asks for the most ids
    assert all(body["temperature"] == 1 for body in server.requests)


def test_answers_keep_the_order_of_rows_when_some_are_slow(served: Served) -> None:
    config, _ = served(seconds=0.05, endpoint={"requests_at_once": 4})
    columns = bundle([5, 9, 3, 7, 12, 4, 8, 6])
    same(make_engine(config).score(columns, TOP), FAKE.score(columns, TOP))


def test_a_server_that_writes_at_least_one_token_is_asked_for_one(served: Served) -> None:
    config, _ = served(dialect="echo", must_write=True)
    columns = bundle([9, 6, 4])
    same(make_engine(config).score(columns, TOP), FAKE.score(columns, TOP))


@pytest.fixture(scope="module")
def eight() -> Engine:
    """A model of few ids, each of which matters."""
    return make_engine(FakeEndpoint(engine="fake", vocabulary=8))


@pytest.mark.parametrize("dialect", ["vllm", "echo"])
def test_ids_that_the_student_lacks_are_dropped_and_the_rest_renormalised(served: Served, eight: Engine, dialect: str) -> None:
    config, _ = served(eight, dialect=dialect, endpoint={"vocabulary": 8, "max_dropped_mass": 1.0})
    columns = bundle([9, 6, 4], vocabulary=8)
    table = eight.score(columns, ScoreRequest("dense"))["dense"].reshape(-1, 8).astype(np.float64)
    wanted = table[:, :7] - np.log(np.exp(table[:, :7]).sum(-1, keepdims=True))
    labels = columns["tokens"][columns["loss_mask"].astype(bool)]
    scores = make_engine(config, vocabulary=7).score(columns, ScoreRequest("topk", top_k=7))
    np.testing.assert_allclose(scores["logprobs"].reshape(-1, 7), -np.sort(-wanted, axis=-1), atol=1e-5)
    np.testing.assert_array_equal(scores["ids"].reshape(-1, 7), np.argsort(-wanted, axis=-1))
    own = np.where(labels < 7, np.take_along_axis(wanted, np.minimum(labels, 6)[:, None], -1)[:, 0], -np.inf)
    np.testing.assert_allclose(scores["logprob"], own, atol=1e-5)
    assert scores["dropped_mass"][0] == pytest.approx(np.exp(table[:, 7]).max(), rel=1e-5)


def test_too_few_usable_ids_are_refused(served: Served, eight: Engine) -> None:
    config, _ = served(eight, max_top_k=4, endpoint={"vocabulary": 8, "max_dropped_mass": 1.0})
    with pytest.raises(Unfit, match="usable ids among a token's top 4"):
        make_engine(config, vocabulary=5).score(bundle([9, 6, 4], vocabulary=5), ScoreRequest("topk", top_k=4))


def test_more_mass_than_allowed_on_ids_that_the_student_lacks_is_refused(served: Served, eight: Engine) -> None:
    config, _ = served(eight, endpoint={"vocabulary": 8})
    with pytest.raises(ValueError, match="ids that the student lacks"):
        make_engine(config, vocabulary=4).score(bundle([9, 6, 4], vocabulary=4), ScoreRequest("topk", top_k=1))


def test_the_fake_server_runs_on_its_own_and_prints_its_address(folder: Path) -> None:
    words = ["--model", str(folder), "--name", "big", "--dialect", "echo", "--max-top-k", "9"]
    command = [sys.executable, "-m", "cluster.engines.fake_server", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            offer = probe(OpenAIEndpoint(engine="openai", base_url=url, model="big", vocabulary=VOCABULARY), 64)
        finally:
            process.kill()
    assert offer is not None and (offer.dialect, offer.top_k) == ("echo", 9)


# what the server can give


@pytest.mark.parametrize("dialect", ["vllm", "echo"])
@pytest.mark.parametrize("truncates", [False, True], ids=["refuses", "truncates"])
def test_the_most_ids_of_a_token_are_found_by_asking(served: Served, dialect: str, truncates: bool) -> None:
    config, _ = served(dialect=dialect, max_top_k=20, truncates=truncates)
    offer = probe(config, 64)
    assert offer is not None and offer.top_k == 20
    with pytest.raises(Unfit, match=r"gives 20 ids of a token.*expected the 64.*top_k to at most 20.*--max-logprobs 64"):
        make_engine(config).score(bundle([9, 6]), ScoreRequest("topk", top_k=64))
    enough = ScoreRequest("topk", top_k=20)
    same(make_engine(config).score(bundle([9, 6]), enough), FAKE.score(bundle([9, 6]), enough))


def test_an_offer_names_its_limits_and_what_answers(served: Served) -> None:
    config, server = served(context_tokens=4096)
    offer = probe(config, 64)
    assert offer is not None
    assert offer.line == f"fake at {server.url} (prompt_logprobs), at least top-64, rows up to 4,095 tokens"
    wanted = {"engine": "openai", "url": server.url, "model": "fake", "vocabulary": 512, "root": "fake", "owned_by": "fake"}
    assert json.loads(json.dumps(offer.identity)) == wanted


@pytest.mark.parametrize("listing", ["nothing", "error"])
def test_a_server_need_not_list_its_models(served: Served, naps: list[float], listing: str) -> None:
    config, _ = served(listing=listing, context_tokens=4096)
    offer = probe(config)
    assert offer is not None and offer.context_tokens is None and "root" not in offer.identity


def test_endpoints_that_answer_in_their_own_actors_are_not_probed() -> None:
    assert probe(FakeEndpoint(engine="fake", vocabulary=9)) is None
    assert probe(TransformersEndpoint(model="x/y")) is None
    identity = TransformersEndpoint(model="x/y", dtype="bfloat16").identity
    assert identity == {"engine": "transformers", "quantization": "none", "attention": "sdpa"}  # weights and dtype are told apart


@pytest.mark.parametrize(
    ("behaviour", "endpoint", "words"),
    [
        ({"dialect": "none"}, {}, ["base_url", "no prompt_logprobs", "no log-probabilities of the prompt", "vllm serve"]),
        ({"dialect": "text"}, {}, ["named by their text", "token_id:123"]),
        ({"adds_bos": True}, {}, ["9 tokens for a prompt of 8", "changes what it is sent"]),
        ({"adds_bos": True, "dialect": "echo"}, {}, ["an echo of other tokens"]),
        ({}, {"model": "other"}, ["model", "'other'", "one of its models: fake"]),
        ({"listing": "nothing"}, {"model": "other"}, ["status 404", "does not exist"]),
        ({"broken": 99}, {}, ["status 500 after 3 tries", "the engine is broken"]),
        ({}, {"base_url": "http://127.0.0.1:9/v1"}, ["no answer after 3 tries", "ConnectError", "Start the server"]),
        ({}, {"base_url": "127.0.0.1/v1"}, ["base_url", "http://"]),
        ({}, {"base_url": "http://me:sesame@127.0.0.1/v1"}, ["carries a password", "api_key_env"]),
        ({}, {"base_url": "http://10.0.0.1/v1", "api_key_env": "NO_SUCH_KEY"}, ["api_key_env", "NO_SUCH_KEY", "Export"]),
    ],
)
def test_a_server_that_cannot_serve_is_refused(
    served: Served, naps: list[float], behaviour: dict[str, Any], endpoint: dict[str, Any], words: list[str]
) -> None:
    config, _ = served(endpoint=endpoint, **behaviour)
    with pytest.raises(Unfit) as caught:
        probe(config, 8)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("kind", ["dense", "sampled", "hidden"])
def test_kinds_that_a_server_does_not_give_are_refused(served: Served, kind: Any) -> None:
    config, _ = served()
    with pytest.raises(ValueError, match=f"asked for '{kind}'.*expected per-token or topk.*a saved model"):
        make_engine(config).score(bundle([9, 6]), ScoreRequest(kind, draws=4))


def test_a_token_beyond_the_vocabulary_is_refused(served: Served) -> None:
    config, _ = served(endpoint={"vocabulary": 100})
    with pytest.raises(ValueError, match="expected less than the endpoint's vocabulary of 100"):
        make_engine(config).score(bundle([9, 6]), LABELS)


# faults


def test_a_busy_server_is_asked_again_when_it_says_so(served: Served, naps: list[float]) -> None:
    config, server = served()
    engine = ready(config)
    server.behaviour.busy, server.behaviour.retry_after = 2, "7"
    columns = bundle([9, 6])
    columns["loss_mask"][9:] = 0
    same(engine.score(columns, LABELS), FAKE.score(columns, LABELS))
    assert naps == [7.0, 7.0]


def test_pauses_grow_and_are_left_to_chance_by_half(naps: list[float], served: Served) -> None:
    config, server = served(endpoint={"max_retries": 4})
    engine = ready(config)
    server.behaviour.broken = 4
    engine.score(bundle([9, 0]), LABELS)
    assert len(naps) == 4
    assert all(0.25 * 2**i <= nap <= 0.5 * 2**i for i, nap in enumerate(naps))


def test_a_server_that_stays_broken_is_named_with_its_words(served: Served, naps: list[float]) -> None:
    config, server = served(endpoint={"max_retries": 2})
    engine = ready(config)
    server.behaviour.broken = 99
    with pytest.raises(ServerFailed, match=rf"{server.url}/completions: status 500 after 3 tries.*the engine is broken"):
        engine.score(bundle([9, 6]), LABELS)


def test_a_server_that_is_too_slow_counts_as_lost(served: Served, naps: list[float]) -> None:
    config, server = served(endpoint={"max_retries": 0, "timeout_seconds": 0.3})
    engine = ready(config)
    server.behaviour.seconds = 1.0
    with pytest.raises(ServerFailed, match=r"no answer after 1 try.*ReadTimeout"):
        engine.score(bundle([9, 6, 4]), LABELS)


def test_a_refused_request_is_not_repeated(served: Served, naps: list[float]) -> None:
    config, _ = served(context_tokens=20)
    engine = ready(config)
    with pytest.raises(ServerFailed, match="status 400 after 1 try.*maximum context length is 20"):
        engine.score(bundle([30, 6], keep=1.0), LABELS)
    assert naps == []


def test_a_key_is_sent_and_never_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = served(api_key="sesame", endpoint={"api_key_env": "MY_KEY"})
    monkeypatch.setenv("MY_KEY", "sesame")
    assert probe(config) is not None
    monkeypatch.setenv("MY_KEY", "simsalabim")
    with pytest.raises(Unfit, match=r"api_key_env.*status 401.*provided: \*\*\*.*Export MY_KEY") as caught:
        probe(config)
    said = "".join((str(caught.value), repr(caught.value), repr(caught.value.__cause__), repr(config), str(config.identity)))
    assert "simsalabim" not in said


def test_requests_are_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(openai_client, "monotonic", lambda: now[0])
    monkeypatch.setattr(openai_client, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    for per_minute, at_once in ((30, 1), (240, 4)):
        pace, began = Pace(per_minute), now[0]
        for _ in range(at_once):
            pace.take()
        assert now[0] == began  # a second's worth goes at once
        for _ in range(30):
            pace.take()
        assert now[0] - began == pytest.approx(30 * 60 / per_minute)


def test_actors_share_the_requests_of_a_minute(served: Served, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "monotonic", lambda: 100.0)
    config, _ = served(endpoint={"requests_per_minute": 60, "actors": 2})
    engine = ready(config)
    del naps[:]
    engine.score(bundle([5, 5, 5, 5, 0]), LABELS)
    assert np.diff(sorted(naps)).tolist() == [2.0, 2.0, 2.0]


def test_prompt_tokens_are_paid_for(served: Served) -> None:
    config, _ = served(endpoint={"price_per_million_tokens": 250_000.0})
    columns = bundle([9, 30, 17, 12], keep=1.0)
    scores = make_engine(config).score(columns, LABELS)
    check_scores(columns, scores, LABELS, VOCABULARY)
    assert scores["cost"].tolist() == [(9 + 30 + 17) / 4]


# what is said is what the model says


def test_a_tempered_server_is_found_by_comparing_rows(served: Served, folder: Path) -> None:
    engine = make_engine(TransformersEndpoint(model=str(folder)))
    config, server = served(engine, temperature=2.0, endpoint={"local_model": str(folder), "calibration_rows": 2})
    columns = bundle([9, 30, 17, 12], keep=1.0)
    with pytest.raises(Unfit) as caught:
        make_engine(config).score(columns, LABELS)
    words = ["max_calibration_error", "nats on average on 37 tokens of 2 rows", "at most 0.05", "temperature 1", server.url]
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_numbers_that_are_no_log_probabilities_are_refused(served: Served) -> None:
    class Logits:
        def score(self, columns: Columns, request: Any) -> Columns:
            return {"dense": FAKE.score(columns, request)["dense"] + 9}

    config, _ = served(Logits())
    with pytest.raises(Unfit, match=r"total probability of .*raw_logprobs"):
        make_engine(config).score(bundle([9, 6]), TOP)


def test_a_token_that_is_told_besides_the_top_ids_is_none_of_them() -> None:
    entry = {"9": {"logprob": -4.0, "rank": 40}, "5": {"logprob": -0.5, "rank": 1}}
    (said,) = PromptLogprobs().read({"prompt_logprobs": [None, entry]}, [1, 9], 2)
    assert said == Said(-4.0, {5: -0.5})
    equal = {"9": {"logprob": -0.5, "rank": 3}, "5": {"logprob": -0.5, "rank": 1}, "7": {"logprob": -0.5, "rank": 2}}
    assert PromptLogprobs().read({"prompt_logprobs": [None, equal]}, [1, 9], 2) == [Said(-0.5, {5: -0.5, 7: -0.5})]
    names = {"token_id:9": -4.0, "token_id:5": -0.5, "token_id:7": -0.7}
    choice = {"tokens": ["token_id:1", "token_id:9"], "token_logprobs": [None, -4.0], "top_logprobs": [None, names]}
    assert Echo().read({"logprobs": choice}, [1, 9], 2) == [Said(-4.0, {5: -0.5, 7: -0.7})]


def test_the_first_rows_end_with_one_that_has_loss_tokens() -> None:
    columns = bundle([3, 4, 5, 6], keep=1.0)
    columns["loss_mask"][3:7] = 0
    assert first_rows(columns, 2)["lengths"].tolist() == [3, 4, 5]
    assert first_rows(columns, 99)["lengths"].tolist() == [3, 4, 5]
    assert first_rows({**columns, "loss_mask": columns["loss_mask"] * 0}, 2)["lengths"].tolist() == []
