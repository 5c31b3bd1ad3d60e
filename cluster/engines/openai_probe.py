"""Asks a server what it can give, with a few tiny requests: its models, its context, prompt scores by id, most ids of a token;
and how it can be asked to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from cluster.config import OpenAIEndpoint
from cluster.engines.openai_client import Server, ServerFailed
from cluster.engines.openai_dialects import DIALECTS, Dialect, NotScored, Said, ids_given
from cluster.engines.openai_manners import MANNERS, Manner, NotWritten, read_answer
from cluster.offers import Offer, Unfit, WritingOffer

PROBE_TOKENS = 8
"""Of the prompt that a server is tried with."""
WORDS = "Once upon a time"
"""The same in words."""
SHOWN_NAMES = 5
KEY_STATUSES = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
WORKS = "Serve the model with vLLM (`vllm serve MODEL`), or name a saved model as endpoint and let its own actors score."


@dataclass(frozen=True)
class Reply:
    """What a server says of one prompt, and the tokens that it charges for."""

    said: list[Said]
    prompt_tokens: int


@dataclass(frozen=True)
class _OneToken:
    """Drawn from all ids."""

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1
    seed: int = 0
    stop: tuple[int, ...] = ()


def ask(server: Server, config: OpenAIEndpoint, dialect: Dialect, tokens: list[int], top_k: int) -> Reply:
    """Scores one prompt. `NotScored` when the answer has no scores of it, `ServerFailed` when there is none."""
    answer = server.post("/completions", {"model": config.model, **dialect.body(tokens, top_k)})
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NotScored("no choices")
    usage = answer.get("usage")
    charged = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return Reply(dialect.read(choices[0], tokens, top_k), int(charged or len(tokens)))


def probe_server(server: Server, config: OpenAIEndpoint, top_k: int = 1) -> tuple[Offer, Dialect]:
    """What the server gives, up to `top_k` ids of a token. `Unfit` when it cannot be reached, does not list the model, or gives
    no scores of a prompt's tokens by id."""
    card = _model_card(server, config)
    dialect = _dialect(server, config)
    context = card.get("max_model_len")
    reported = {name: card[name] for name in ("root", "owned_by") if isinstance(card.get(name), str)}
    offer = Offer(
        url=server.url,
        model=config.model,
        dialect=dialect.name,
        kinds=frozenset({"topk", "per-token"}),
        top_k=most_ids(server, config, dialect, top_k),
        context_tokens=context - dialect.generates if isinstance(context, int) else None,
        identity={**config.identity, **reported},
    )
    return offer, dialect


def probe_writing(server: Server, config: OpenAIEndpoint) -> tuple[WritingOffer, Manner]:
    """How the server writes; scores are not asked for. `Unfit` when it cannot be reached, does not list the model, or does not write."""
    context = _model_card(server, config).get("max_model_len")
    manner = _manner(server, config)
    return WritingOffer(
        url=server.url,
        model=config.model,
        manner=manner.name,
        sets_top_k=manner.settings is not None,
        context_tokens=context if isinstance(context, int) else None,
    ), manner


def most_ids(server: Server, config: OpenAIEndpoint, dialect: Dialect, wanted: int) -> int:
    """The most ids of a token, up to `wanted`, that the server gives: it may refuse more, or leave some out without a word."""
    given = _ids(server, config, dialect, wanted)
    if given is not None:
        return min(given, wanted)
    low, high = 1, wanted  # `low` is given, `high` is refused
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _ids(server, config, dialect, middle) is not None else (low, middle)
    return low


def _ids(server: Server, config: OpenAIEndpoint, dialect: Dialect, top_k: int) -> int | None:
    """Ids given when `top_k` are asked for; None when that is refused."""
    tokens = _prompt(config)
    try:
        return ids_given(ask(server, config, dialect, tokens, top_k).said, tokens)
    except ServerFailed as failure:
        if failure.refused:
            return None
        raise _unanswered(failure, config) from failure


def _model_card(server: Server, config: OpenAIEndpoint) -> Mapping[str, Any]:
    """What the server lists about the model; nothing when it lists no models: some have no such page, or an error on it."""
    try:
        listed = server.get("/models").get("data")
    except ServerFailed as failure:
        if failure.status is None or failure.status in KEY_STATUSES:
            raise _unanswered(failure, config) from failure
        listed = None
    cards = {c["id"]: c for c in listed if isinstance(c, dict) and "id" in c} if isinstance(listed, list) else {}
    if cards and config.model not in cards:
        names = ", ".join(sorted(map(str, cards))[:SHOWN_NAMES])
        raise Unfit("model", f"{config.model!r}, which {server.url} does not list", f"one of its models: {names}", "Correct the name.")
    found: Mapping[str, Any] = cards.get(config.model, {})
    return found


def _dialect(server: Server, config: OpenAIEndpoint) -> Dialect:
    """The first dialect in which the server scores a prompt."""
    found, said = _first(DIALECTS, lambda d: ask(server, config, d, _prompt(config), 1), config)
    if found is None:
        expected = "log-probabilities of a prompt's tokens by id (`prompt_logprobs`, or `echo` whose tokens are named `token_id:123`)"
        raise Unfit("base_url", f"a server that does not score the token ids of a prompt ({server.url}; {said})", expected, WORKS)
    return found


def _manner(server: Server, config: OpenAIEndpoint) -> Manner:
    """The first manner in which the server writes a token."""

    def write(manner: Manner) -> None:
        prompt: Sequence[int] | str = _prompt(config) if manner.ids else WORDS
        read_answer(server.post("/completions", {"model": config.model, **manner.body(prompt, _OneToken(), 0)}))

    found, said = _first(MANNERS, write, config)
    if found is None:
        do = "Serve the model where /completions goes on from a prompt (`vllm serve MODEL`, `transformers serve MODEL`)."
        raise Unfit("base_url", f"a server that does not write ({server.url}; {said})", "a text under /completions", do)
    return found


class _Named(Protocol):
    @property
    def name(self) -> str: ...


W = TypeVar("W", bound=_Named)


def _first(ways: Sequence[W], attempt: Callable[[W], object], config: OpenAIEndpoint) -> tuple[W | None, str]:
    """The first way of asking that the server does not refuse; else None, and what it said to each. `Unfit` when it does not answer."""
    said = []
    for way in ways:
        try:
            attempt(way)
        except (NotScored, NotWritten) as error:
            said.append(f"asked with {way.name}: {error}")
        except ServerFailed as failure:
            said.append(f"asked with {way.name}: {_refused(failure, config)}")
        else:
            return way, ""
    return None, "; ".join(said)


def _refused(failure: ServerFailed, config: OpenAIEndpoint) -> str:
    """What a server refuses, in words. `Unfit` when it did not answer, or refuses the key."""
    if not failure.refused or failure.status in KEY_STATUSES:
        raise _unanswered(failure, config) from failure
    return f"status {failure.status}, {failure.words!r}"


def _unanswered(failure: ServerFailed, config: OpenAIEndpoint) -> Unfit:
    if failure.status in KEY_STATUSES:
        do = f"Export {config.api_key_env} with a key that may use {config.model!r}."
        return Unfit("api_key_env", f"a refusal ({failure})", "a key that the server takes", do)
    do = "Start the server, or correct the address; it ends in /v1 mostly."
    return Unfit("base_url", f"no usable answer ({failure})", "a server that answers there", do)


def _prompt(config: OpenAIEndpoint) -> list[int]:
    """Ids of ordinary tokens in most vocabularies: the first ones are often special."""
    start = max(0, min(16, config.vocabulary - PROBE_TOKENS))
    return [(start + i) % config.vocabulary for i in range(PROBE_TOKENS)]
