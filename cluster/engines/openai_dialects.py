"""How servers are asked for the log-probabilities of a prompt's own tokens, and how they answer.

OpenAI's schema has `echo` with `logprobs`, whose answers name tokens by their text. Text does not name an id for certain, so that
dialect counts only where `return_tokens_as_token_ids` makes names of the form `token_id:123`. vLLM has `prompt_logprobs`, whose
answers name ids. Both may add the token itself to its top ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

ID_NAME = "token_id:"
"""Begins the name of a token that is given by its id."""
Json = dict[str, Any]


class NotScored(ValueError):
    """An answer that does not say what a dialect promises; the text says what it has instead."""


@dataclass(frozen=True)
class Said:
    """What is said of one token, in natural logarithms."""

    logprob: float
    """Of the token itself."""
    top: Mapping[int, float]
    """The most probable ids, at most as many as asked for; the token is one of them only if it belongs there."""


class Dialect(Protocol):
    """One way to ask and to be answered."""

    @property
    def name(self) -> str: ...
    @property
    def generates(self) -> int:
        """Tokens that a request makes the server add to the prompt."""

    def body(self, tokens: Sequence[int], top_k: int) -> Json:
        """What is asked, besides the model."""
        ...

    def read(self, choice: Json, tokens: Sequence[int], top_k: int) -> list[Said]:
        """What is said of every token but the first. `NotScored` when it is not about these tokens or not by id."""
        ...


@dataclass(frozen=True)
class PromptLogprobs:
    """vLLM's own field."""

    name: str = "prompt_logprobs"
    generates: int = 1

    def body(self, tokens: Sequence[int], top_k: int) -> Json:
        return {"prompt": list(tokens), "max_tokens": self.generates, "temperature": 1.0, "prompt_logprobs": top_k}

    def read(self, choice: Json, tokens: Sequence[int], top_k: int) -> list[Said]:
        found = choice.get("prompt_logprobs")
        if not isinstance(found, list):
            raise NotScored("no prompt_logprobs")
        if len(found) != len(tokens):
            raise NotScored(f"prompt_logprobs of {len(found)} tokens for a prompt of {len(tokens)}: the server changes what it is sent")
        return [self._said(entry, token, top_k) for entry, token in zip(found[1:], tokens[1:], strict=True)]

    def _said(self, entry: Json | None, token: int, top_k: int) -> Said:
        if not isinstance(entry, dict) or str(token) not in entry:
            raise NotScored(f"no log-probability of the token {token} that was sent")
        own = entry[str(token)]
        extra = own.get("rank") is not None and own["rank"] > top_k
        top = {int(i): float(v["logprob"]) for i, v in entry.items() if not (extra and i == str(token))}
        return Said(float(own["logprob"]), _first(top, token, top_k))


@dataclass(frozen=True)
class Echo:
    """The prompt echoed with OpenAI's `logprobs`, every name an id."""

    name: str = "echo"
    generates: int = 0

    def body(self, tokens: Sequence[int], top_k: int) -> Json:
        return {
            "prompt": list(tokens),
            "max_tokens": self.generates,
            "temperature": 1.0,
            "echo": True,
            "logprobs": top_k,
            "return_tokens_as_token_ids": True,
        }

    def read(self, choice: Json, tokens: Sequence[int], top_k: int) -> list[Said]:
        found = choice.get("logprobs")
        parts = [found.get(n) for n in ("tokens", "token_logprobs", "top_logprobs")] if isinstance(found, dict) else [None]
        if not all(isinstance(part, list) for part in parts):
            raise NotScored("no log-probabilities of the prompt")
        names, own, tops = (part[: len(tokens)] for part in parts if part is not None)
        if not all(str(name).startswith(ID_NAME) for name in names):
            raise NotScored(f"tokens named by their text, such as {str(names[0])[:20]!r}, which does not tell their ids")
        if [int(name.removeprefix(ID_NAME)) for name in names] != list(tokens):
            raise NotScored("an echo of other tokens than were sent: the server changes what it is sent")
        return [self._said(o, top, t, top_k) for o, top, t in zip(own[1:], tops[1:], tokens[1:], strict=True)]

    def _said(self, own: float | None, entry: Json | None, token: int, top_k: int) -> Said:
        if own is None or not isinstance(entry, dict):
            raise NotScored(f"no log-probability of the token {token} that was sent")
        if not all(name.startswith(ID_NAME) for name in entry):
            raise NotScored("top tokens named by their text, which does not tell their ids")
        top = {int(name.removeprefix(ID_NAME)): float(value) for name, value in entry.items()}
        return Said(float(own), _first(top, token, top_k))


DIALECTS: tuple[Dialect, ...] = (PromptLogprobs(), Echo(), Echo(generates=1))
"""In the order in which a server is asked; the last for servers that want to write something."""


def _first(top: Mapping[int, float], token: int, top_k: int) -> dict[int, float]:
    """The `top_k` most probable, falling. Of equals the token itself comes last: it is what may be there besides."""
    ordered = sorted(top.items(), key=lambda pair: (-pair[1] if not math.isnan(pair[1]) else math.inf, pair[0] == token, pair[0]))
    return dict(ordered[:top_k])


def ids_given(said: Sequence[Said], tokens: Sequence[int]) -> int:
    """Ids that a server gives of each token at least. A token that stands last among its top ids may have been added to them."""
    given = [len(s.top) - (next(reversed(s.top), None) == t) for s, t in zip(said, tokens[1:], strict=True)]
    return max(1, *given)
