"""A real server that gives no scores, `transformers serve`: it writes, and is refused for scores in words that say what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from transformers import AutoTokenizer

from cluster.config import OpenAIEndpoint, TransformersEndpoint
from cluster.endpoints import check_written, make_engine, probe, probe_writer
from cluster.engines import Engine, Writer
from cluster.offers import Unfit
from strategies.core import Sampling, ScoreRequest
from tests.cluster.test_engines import bundle
from tests.cluster.test_writers import bundle as asked
from tests.cluster.test_writers import texts
from tests.tiny import tiny_model, tiny_tokenizer

START_SECONDS = 120.0
MISSING = [name for name in ("openai", "fastapi", "uvicorn", "starlette") if find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"`transformers serve` needs {', '.join(MISSING)}: pip install 'transformers[serving]'"),
]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIEndpoint]:
    """The endpoint of a tiny model that `transformers serve` serves on this machine."""
    home = tmp_path_factory.mktemp("serve")
    model = home / "model"
    tiny_tokenizer(model)
    tiny_model(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (home / "log").open("wb") as log:
        environment = os.environ | {"HF_HOME": str(home / "hub")}  # so that it lists no models of this machine
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, home / "log")
        yield OpenAIEndpoint(engine="openai", base_url=f"http://127.0.0.1:{port}/v1", model=str(model), vocabulary=512)
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise TimeoutError(f"{url} did not answer:\n{log.read_text()[-3000:]}")


def test_a_server_without_prompt_scores_is_refused_in_words(serving: OpenAIEndpoint) -> None:
    for ask in (probe, lambda config: make_engine(config).score(bundle([9, 6]), ScoreRequest("per-token"))):
        with pytest.raises(Unfit) as caught:
            ask(serving)
        words = [
            "base_url",
            serving.base_url,
            "does not score",
            "asked with prompt_logprobs",
            "asked with echo",
            "token_id:123",
            "vllm serve",
        ]
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
        assert len(str(caught.value)) < 900
    print(caught.value)


def author(engine: Engine) -> Writer:
    assert isinstance(engine, Writer)
    return engine


def test_it_writes_what_the_model_writes_here(serving: OpenAIEndpoint) -> None:
    offer = probe_writer(serving)
    assert offer is not None and offer.manner == "prompts as text, generation_config"
    tokenizer = AutoTokenizer.from_pretrained(serving.model)
    prompts = asked([tokenizer(words)["input_ids"] for words in ("def f(x):", "<|im_start|>user\nparse<|im_end|>\n", "return")])
    sampling = Sampling(max_new_tokens=12, stop=(0, 2))
    here = author(make_engine(TransformersEndpoint(model=serving.model), threads=1)).write(prompts, sampling)
    there = author(make_engine(serving.model_copy(update={"tokenizer": serving.model}))).write(prompts, sampling)
    check_written(prompts, there, 1, 512)
    words = [[tokenizer.decode(t, skip_special_tokens=True).rstrip("\ufffd") for t in texts(w)] for w in (there, here)]
    assert [a for a, b in zip(*words, strict=True) if not (a and b.startswith(a))] == [], words


def test_its_draws_differ_by_sample_and_follow_top_k(serving: OpenAIEndpoint) -> None:
    """Its seeds are those of the whole process, so texts that are asked for at once are not told apart by them."""
    engine = author(make_engine(serving.model_copy(update={"tokenizer": serving.model, "requests_at_once": 1})))
    prompts = asked([[20, 21, 22]])
    drawn = Sampling(max_new_tokens=12, stop=(0, 2), temperature=1.0, samples=4)
    first = texts(engine.write(prompts, drawn))
    assert len({tuple(t) for t in first}) > 1 and texts(engine.write(prompts, drawn)) == first
    narrow = texts(engine.write(prompts, Sampling(**{**vars(drawn), "top_k": 1})))
    greedy = texts(engine.write(prompts, Sampling(max_new_tokens=12, stop=(0, 2))))
    assert narrow == greedy * 4
