"""How servers are asked to write, and what they answer.

OpenAI's schema takes a prompt as token ids or as text and answers in text. vLLM answers in ids too where it is asked to. Settings
that the schema lacks are sent where a server takes them, so that a model's own defaults, such as a repetition penalty, do not enter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.engines import Sampling

Json = dict[str, Any]
Settings = Callable[[Sampling], Json]


class NotWritten(ValueError):
    """An answer without a text; the text of this says what it has instead."""


@dataclass(frozen=True)
class Answer:
    """What a server wrote."""

    text: str
    ids: list[int] | None
    """The text's own, the one that ended it mostly included; None from a server that answers in text."""
    logprobs: list[float]
    """Of `ids`, in natural logarithms; NaN where it does not tell."""
    ended: bool
    """By itself, and not by the limit of tokens."""
    stop: int | None
    """The id that ended it, from a server that says so."""
    prompt_tokens: int
    """That it charges for."""
    written_tokens: int


def _vllm(sampling: Sampling) -> Json:
    return {
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.stop),
        "return_token_ids": True,
        "logprobs": 1,  # a server may leave out the written token's own where 0 others are asked for
    }


def _transformers(sampling: Sampling) -> Json:
    """`transformers serve` draws only if a whole configuration says so, whatever the temperature."""
    ends = {"eos_token_id": list(sampling.stop), "pad_token_id": sampling.stop[0]} if sampling.stop else {}
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k} if sampling.temperature else {}
    return {"generation_config": json.dumps({"do_sample": sampling.temperature > 0, **drawn, **ends})}


@dataclass(frozen=True)
class Manner:
    """One way to ask."""

    name: str
    ids: bool
    """Prompts are sent as token ids, and not as text."""
    settings: Settings | None = None
    """Those that OpenAI's schema lacks; None for that schema alone."""

    def body(self, prompt: Sequence[int] | str, sampling: Sampling, seed: int) -> Json:
        """What is asked, besides the model: one text."""
        return {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "frequency_penalty": 0.0,
            **(self.settings(sampling) if self.settings else {}),
        }


MANNERS = (
    Manner("prompts as ids", True, _vllm),
    Manner("prompts as text, generation_config", False, _transformers),
    Manner("prompts as ids, OpenAI's settings alone", True),
    Manner("prompts as text, OpenAI's settings alone", False),
)
"""In the order in which a server is asked."""


def read_answer(answer: Json) -> Answer:
    """What a completion says. `NotWritten` when it holds no text."""
    choices, usage = answer.get("choices"), answer.get("usage")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
        raise NotWritten("no text in its first choice")
    ids, reason = choice.get("token_ids"), choice.get("stop_reason")
    known = [int(i) for i in ids] if isinstance(ids, list) else None
    counts = usage if isinstance(usage, dict) else {}
    return Answer(
        text=choice["text"],
        ids=known,
        logprobs=_logprobs(choice.get("logprobs"), len(known or ())),
        ended=choice.get("finish_reason") == "stop",
        stop=reason if isinstance(reason, int) else None,
        prompt_tokens=int(counts.get("prompt_tokens") or 0),
        written_tokens=int(counts.get("completion_tokens") or 0),
    )


def _logprobs(said: Json | None, count: int) -> list[float]:
    """Of `count` ids; an answer about another number of tokens is about other ones."""
    given = said.get("token_logprobs") if isinstance(said, dict) else None
    if not isinstance(given, list) or len(given) != count:
        return [math.nan] * count
    return [math.nan if value is None else float(value) for value in given]
