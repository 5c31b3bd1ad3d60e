"""An OpenAI-compatible server without a GPU: scores and texts of a small model or of hashed distributions, and faults on demand.

For tests and dry runs of endpoints behind a URL: `python -m cluster.engines.fake_server --vocabulary 512`. Under `/v1/completions` it
scores prompts of token ids, beside one token that means nothing, or writes, where no scores are asked for.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cluster.engines import Columns, Engine, Kind
from cluster.engines.fake_server_http import Handler, Http, Refused
from cluster.engines.fake_server_write import Speaks, Tokenizer, Unwritten, write

Dialect = Literal["vllm", "echo", "text", "none"]
"""How it gives scores: `prompt_logprobs`; echoed with ids as names; echoed with text as names; not at all."""
Json = dict[str, Any]


@dataclass
class Behaviour:
    """How a fake server answers. Counts go down as they are used."""

    dialect: Dialect = "vllm"
    temperature: float = 1.0
    """Of the log-probabilities that it gives, whatever is asked."""
    max_top_k: int | None = None
    """Most ids of a token."""
    truncates: bool = False
    """Gives `max_top_k` ids without a word where more are asked for, instead of refusing."""
    context_tokens: int | None = None
    """Most tokens of a prompt and what is written after it."""
    busy: int = 0
    """Requests that are answered with 429 first."""
    retry_after: str = "0"
    """Header of those answers."""
    broken: int = 0
    """Requests that are answered with 500 first."""
    seconds: float = 0.0
    """Sleep before every second answer."""
    must_write: bool = False
    """Refuses to write no token."""
    adds_bos: bool = False
    """Puts a token before every prompt."""
    api_key: str | None = None
    """Asked of every request."""
    listing: Literal["model", "nothing", "error"] = "model"
    """What `/v1/models` answers."""
    speaks: Speaks = "ids"
    """How it writes."""
    refuses: tuple[str, ...] = ()
    """Fields of a request that it does not take."""


@dataclass(frozen=True)
class _Dense:
    kind: Kind = "dense"
    top_k: int = 0
    draws: int = 0
    exponent: float = 1.0


@dataclass
class FakeServer:
    """Serves on a free port of this machine between `start` and `stop`, or inside a `with`."""

    engine: Engine
    model: str = "fake"
    behaviour: Behaviour = field(default_factory=Behaviour)
    port: int = 0
    tokenizer: Tokenizer | None = None
    """Needed to write where it speaks text."""
    requests: list[Json] = field(default_factory=list)
    """Bodies of the prompts that came, in order."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._http = Http(("127.0.0.1", self.port), Handler)
        self._http.fake = self
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def api_key(self) -> str | None:
        return self.behaviour.api_key

    def start(self) -> FakeServer:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> FakeServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def models(self) -> Json:
        """Answer of `/v1/models`."""
        if self.behaviour.listing == "error":
            raise Refused(500, "no list of models")
        card = {"id": self.model, "object": "model", "owned_by": "fake", "root": self.model, "max_model_len": self.behaviour.context_tokens}
        return {"object": "list", "data": [card] if self.behaviour.listing == "model" else []}

    def complete(self, body: Json) -> Json:
        """Answer of `/v1/completions`; `Refused` for what it does not do."""
        self._take_fault(body)
        if unknown := [name for name in self.behaviour.refuses if name in body]:
            raise Refused(422, f"Unexpected fields in the request: {unknown}")
        if "prompt_logprobs" not in body and not body.get("echo"):
            return self._written(body)
        prompt, top_k = self._checked(body)
        sent = [0, *prompt] if self.behaviour.adds_bos else prompt
        choice: Json = {"index": 0, "text": "", "finish_reason": "length"}
        if top_k is not None:
            choice |= self._scores(body, sent, top_k)
        usage = {"prompt_tokens": len(sent), "completion_tokens": body.get("max_tokens", 1)}
        return {"object": "text_completion", "model": self.model, "choices": [choice], "usage": usage}

    def _written(self, body: Json) -> Json:
        how = self.behaviour
        self._check_model(body)
        try:
            with self._lock:
                choice, usage = write(self.engine, body, how.speaks, self.tokenizer)
        except Unwritten as error:
            raise Refused(400, str(error)) from error
        return {"object": "text_completion", "model": self.model, "choices": [choice], "usage": usage}

    def _check_model(self, body: Json) -> None:
        if body.get("model") != self.model:
            raise Refused(404, f"The model `{body.get('model')}` does not exist.")

    def _take_fault(self, body: Json) -> None:
        with self._lock:
            self.requests.append(body)
            number = len(self.requests)
            if self.behaviour.busy:
                self.behaviour.busy -= 1
                raise Refused(429, "too many requests", **{"Retry-After": self.behaviour.retry_after})
            if self.behaviour.broken:
                self.behaviour.broken -= 1
                raise Refused(500, "the engine is broken")
        if number % 2:
            time.sleep(self.behaviour.seconds)

    def _checked(self, body: Json) -> tuple[list[int], int | None]:
        """The prompt, and how many ids of a token are given; None when none are asked for in this server's dialect."""
        prompt, how = body.get("prompt"), self.behaviour
        self._check_model(body)
        if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
            raise Refused(400, "prompt must be a list of token ids")
        written = int(body.get("max_tokens", 1))
        if how.must_write and not written:
            raise Refused(400, "max_tokens must be at least 1")
        if how.context_tokens and len(prompt) + written > how.context_tokens:
            raise Refused(
                400, f"This model's maximum context length is {how.context_tokens} tokens, and {len(prompt) + written} are asked for."
            )
        asked = body.get("prompt_logprobs") if how.dialect == "vllm" else (body.get("logprobs") if body.get("echo") else None)
        if asked is None or how.dialect == "none":
            return prompt, None
        if how.max_top_k is not None and asked > how.max_top_k and not how.truncates:
            raise Refused(400, f"Requested prompt logprobs of {asked}, which is greater than max allowed: {how.max_top_k}")
        return prompt, min(int(asked), how.max_top_k or int(asked))

    def _scores(self, body: Json, tokens: list[int], top_k: int) -> Json:
        logprobs = self._table(tokens)
        ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, :top_k]
        positions = [self._entries(row, best, token) for row, best, token in zip(logprobs, ids, tokens[1:], strict=True)]
        if self.behaviour.dialect == "vllm":
            return {"prompt_logprobs": [None, *({str(i): said for i, said in entries.items()} for entries in positions)]}
        name = "token_id:{}" if self.behaviour.dialect == "echo" and body.get("return_tokens_as_token_ids") else "<{}>"
        own = [entries[token]["logprob"] for entries, token in zip(positions, tokens[1:], strict=True)]
        written = 1 if body.get("max_tokens", 1) else 0
        return {
            "logprobs": {
                "tokens": [name.format(token) for token in tokens + [0] * written],
                "token_logprobs": [None, *own, *[-1.0] * written],
                "top_logprobs": [
                    None,
                    *({name.format(i): said["logprob"] for i, said in entries.items()} for entries in positions),
                    *[{name.format(0): -1.0}] * written,
                ],
            }
        }

    def _table(self, tokens: list[int]) -> NDArray[np.float64]:
        """Log-probabilities `(n - 1, V)` of every token but the first."""
        mask = np.ones(len(tokens), dtype=np.uint8)
        mask[0] = 0
        columns: Columns = {"tokens": np.asarray(tokens, np.int32), "lengths": np.asarray([len(tokens)], np.int32), "loss_mask": mask}
        with self._lock:  # engines answer one at a time
            dense = self.engine.score(columns, _Dense())["dense"]
        logits = dense.astype(np.float64).reshape(len(tokens) - 1, -1) / self.behaviour.temperature
        normaliser = np.log(np.exp(logits).sum(-1, keepdims=True)) if self.behaviour.temperature != 1.0 else 0.0
        return np.asarray(logits - normaliser)

    def _entries(self, row: NDArray[np.float64], best: NDArray[np.int64], token: int) -> dict[int, Json]:
        """As vLLM gives them: the token itself first, whatever its rank, then the best."""
        own = {token: {"logprob": float(row[token]), "rank": int((row >= row[token]).sum()), "decoded_token": f"<{token}>"}}
        ranked = {int(i): {"logprob": float(row[i]), "rank": n, "decoded_token": f"<{i}>"} for n, i in enumerate(best.tolist(), 1)}
        return own | ranked


def main(words: Sequence[str] | None = None) -> None:
    """Serves until it is interrupted; prints its URL first."""
    parser = argparse.ArgumentParser(prog="python -m cluster.engines.fake_server", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=512, help="ids of the hashed distributions")
    parser.add_argument("--model", help="folder of a saved model to score with instead")
    parser.add_argument("--name", default="fake", help="name of the model")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--dialect", choices=get_args(Dialect), default="vllm")
    parser.add_argument("--speaks", choices=get_args(Speaks), default="ids", help="how it writes")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, to write where it speaks text")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-top-k", type=int)
    parser.add_argument("--context-tokens", type=int)
    parser.add_argument("--busy", type=int, default=0, help="requests answered with 429 first")
    parser.add_argument("--broken", type=int, default=0, help="requests answered with 500 first")
    parser.add_argument("--seconds", type=float, default=0.0, help="sleep before every second answer")
    parser.add_argument("--api-key-env", help="environment variable with the key that is asked for")
    given = parser.parse_args(words)
    names = ("dialect", "speaks", "temperature", "max_top_k", "context_tokens", "busy", "broken", "seconds")
    key = os.environ[given.api_key_env] if given.api_key_env else None
    behaviour = Behaviour(**{name: getattr(given, name) for name in names}, api_key=key)
    server = FakeServer(
        make_scorer(given.model, given.vocabulary), given.name, behaviour, given.port, tokenizer=make_tokenizer(given.tokenizer)
    )
    print(server.url, flush=True)
    with server:
        threading.Event().wait()


def make_tokenizer(folder: str | None) -> Tokenizer | None:
    """The tokenizer in a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder) if folder else None


def make_scorer(model: str | None, vocabulary: int) -> Engine:
    """What scores: a saved model, or hashed distributions over `vocabulary` ids."""
    from cluster.config import FakeEndpoint, TransformersEndpoint
    from cluster.endpoints import make_engine

    return make_engine(TransformersEndpoint(model=model) if model else FakeEndpoint(engine="fake", vocabulary=vocabulary))


if __name__ == "__main__":
    main()
