"""What an endpoint behind a URL can give, and how it is said that it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.engines import Kind, Sampling


class Unfit(ValueError):
    """An endpoint that cannot do what is asked of it. `field` is the setting of the endpoint that it is about."""

    def __init__(self, field: str, got: str, expected: str, do: str):
        self.field, self.got, self.expected, self.do = field, got, expected, do
        super().__init__(f"{field}: got {got}; expected {expected}. {do}")

    def __reduce__(self) -> tuple[type[Unfit], tuple[str, str, str, str]]:
        return (Unfit, (self.field, self.got, self.expected, self.do))


@dataclass(frozen=True)
class Offer:
    """What a server was found to give."""

    url: str
    model: str
    dialect: str
    """How prompt scores are asked for and come back."""
    kinds: frozenset[Kind]
    top_k: int
    """Ids of one token that it was seen to give; no more than were asked for."""
    context_tokens: int | None
    """Longest row it scores; None when it does not say."""
    identity: Mapping[str, object]
    """Names what answers, in JSON's types."""

    @property
    def line(self) -> str:
        """The offer in some words."""
        context = f"rows up to {self.context_tokens:,} tokens" if self.context_tokens else "a context that it does not tell"
        return f"{self.model} at {self.url} ({self.dialect}), at least top-{self.top_k}, {context}"

    def check(self, kind: Kind, top_k: int) -> None:
        """`Unfit` when it does not give this of a token. `top_k` is read of kind `topk` alone."""
        if kind not in self.kinds:
            given = " or ".join(sorted(self.kinds))
            do = f"Take {given} of this endpoint, or name a saved model as endpoint and let its own actors score."
            raise Unfit("engine", f"a server that is asked for {kind!r} ({self.url})", given, do)
        if kind == "topk" and top_k > self.top_k:
            do = f"Set top_k to at most {self.top_k}, or raise the server's limit (vLLM: --max-logprobs {top_k})."
            raise Unfit("base_url", f"a server that gives {self.top_k} ids of a token ({self.url})", f"the {top_k} of top_k", do)


@dataclass(frozen=True)
class WritingOffer:
    """How a server was found to write."""

    url: str
    model: str
    manner: str
    """How prompts are sent, and with which settings."""
    sets_top_k: bool
    """Whether it was told how many ids to draw from, besides what OpenAI's schema knows."""
    context_tokens: int | None
    """Longest prompt and text together; None when it does not say."""

    @property
    def line(self) -> str:
        """The offer in some words."""
        context = f"{self.context_tokens:,} tokens of prompt and text" if self.context_tokens else "a context that it does not tell"
        return f"{self.model} at {self.url} ({self.manner}), {context}"

    def check(self, sampling: Sampling) -> None:
        """`Unfit` when it cannot be asked to draw so."""
        if sampling.top_k and not self.sets_top_k:
            do = "Set strategy.top_k=0 (and strategy.top_p instead), or serve the model with vLLM."
            raise Unfit("base_url", f"a server that knows no top_k ({self.url})", f"draws from {sampling.top_k} ids", do)
