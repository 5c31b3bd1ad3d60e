"""A real server that gives no scores, `transformers serve`: found at the door, and named with what to do."""

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

from cluster.config import OpenAIEndpoint
from cluster.endpoints import make_engine, probe
from cluster.offers import Unfit
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
    for ask in (probe, make_engine):
        with pytest.raises(Unfit) as caught:
            ask(serving)  # type: ignore[operator]
        words = ["base_url", serving.base_url, "does not score", "asked by prompt_logprobs", "asked by echo", "token_id:123", "vllm serve"]
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
        assert len(str(caught.value)) < 900
    print(caught.value)
