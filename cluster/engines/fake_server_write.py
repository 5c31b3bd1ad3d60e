"""How the fake server writes: in ids as vLLM does, or in text as `transformers serve` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from cluster.engines import Columns, Engine, Writer

Speaks = Literal["ids", "answers-text", "text", "nothing"]
"""Takes ids and gives them; takes ids and gives text; takes and gives text; does not write."""
Json = dict[str, Any]


class Tokenizer(Protocol):
    """Of `transformers`."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...


class Unwritten(ValueError):
    """A request that is not answered with a text; says why."""


@dataclass(frozen=True)
class _Asked:
    """How a text is to be written (`cluster.engines.Sampling`)."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int
    stop: tuple[int, ...]
    samples: int = 1


def write(engine: Engine, body: Json, speaks: Speaks, tokenizer: Tokenizer | None) -> tuple[Json, Json]:
    """The choice and the usage that answer a request for a text. `Unwritten` for one that is refused."""
    if speaks == "nothing" or not isinstance(engine, Writer):
        raise Unwritten("this model does not write")
    prompt, asked = _prompt(body, speaks, tokenizer), _asked(body)
    columns: Columns = {
        "tokens": np.asarray(prompt, np.int32),
        "lengths": np.asarray([len(prompt)], np.int32),
        "row_id": np.zeros(1, np.int64),
    }
    written = engine.write(columns, asked)
    ids, finished = written["tokens"].tolist(), bool(written["finished"][0])
    choice: Json = {"index": 0, "text": "", "finish_reason": "stop" if finished else "length"}
    if tokenizer is not None:
        choice["text"] = tokenizer.decode(ids, skip_special_tokens=True)
    if speaks == "ids" and body.get("return_token_ids"):
        choice |= {"token_ids": ids, "stop_reason": ids[-1] if finished else None}
        choice["logprobs"] = {"token_logprobs": written["logprobs"].tolist()}
    return choice, {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}


def _prompt(body: Json, speaks: Speaks, tokenizer: Tokenizer | None) -> list[int]:
    prompt = body.get("prompt")
    if speaks == "text":
        if not isinstance(prompt, str) or tokenizer is None:
            raise Unwritten("prompt must be a string.")
        return tokenizer.encode(prompt)
    if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
        raise Unwritten("prompt must be a list of token ids")
    return prompt


def _asked(body: Json) -> _Asked:
    whole = {**body, **json.loads(body.get("generation_config", "{}"))}
    return _Asked(
        temperature=float(whole.get("temperature", 1.0)),
        top_p=float(whole.get("top_p", 1.0)),
        top_k=max(0, int(whole.get("top_k", 0))),
        max_new_tokens=int(whole.get("max_tokens", 16)),
        seed=int(whole.get("seed", 0)),
        stop=tuple(whole.get("stop_token_ids") or whole.get("eos_token_id") or (0,)),
    )
