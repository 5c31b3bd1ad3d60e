"""Checks of endpoints behind a URL: a few tiny requests find whether their servers can give what the stages ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.config import EndpointConfig
from cluster.endpoints import longest_scored, probe, probe_writer
from cluster.offers import Offer, Unfit, WritingOffer
from orchestrator.checks import actors
from orchestrator.checks.networks import Cast
from orchestrator.data import PreparedData
from orchestrator.errors import Refusal
from orchestrator.rollouts import live_authors, longest_read, read_rows
from strategies.core import Sampling, ScoreRequest, Strategy
from strategies.stages.rollout import rollouts


def check_endpoints(
    endpoints: Mapping[str, EndpointConfig],
    asked: Mapping[str, Sequence[ScoreRequest]],
    strategy: Strategy,
    people: Cast,
    data: PreparedData,
) -> tuple[dict[str, Offer | WritingOffer], list[str]]:
    """What the servers among those that answer give, and warnings, after checks of the others' own actors."""
    actors.check_stages(endpoints, asked, strategy, people, data)
    return check_servers(endpoints, asked, live_authors(strategy))


def check_servers(
    endpoints: Mapping[str, EndpointConfig], asked: Mapping[str, Sequence[ScoreRequest]], writing: Mapping[str, Sampling]
) -> tuple[dict[str, Offer | WritingOffer], list[str]]:
    """What every server gives, by endpoint, and warnings. `Refusal` for one that cannot be reached or gives less than is `asked`, and for
    an endpoint that does not write and is to be `writing` while the student trains."""
    found = {name: _offer(name, config, asked.get(name, ()), writing.get(name)) for name, config in endpoints.items()}
    offers = {name: offer for name, offer in found.items() if offer is not None}
    unknown = [name for name in offers if endpoints[name].own_tokenizer is None]
    return offers, [f"endpoint {n!r} names no tokenizer; its model is taken to share the student's." for n in unknown]


def check_lengths(offers: Mapping[str, Offer | WritingOffer], data: PreparedData, strategy: Strategy) -> list[str]:
    """`Refusal` when a server cannot read the longest row; a warning when it does not tell."""
    written = (s.longest_tokens for s in rollouts(strategy.stages))
    longest = max(data.train.longest_tokens, data.held_out.longest_tokens, *written)
    for name, offer in offers.items():
        reads = longest_read(strategy, name, longest)
        if offer.context_tokens is not None and reads > offer.context_tokens:
            least = longest * offer.context_tokens // reads
            do = f"Set data.max_length_tokens={least} or less, or serve {offer.model!r} with a longer context."
            expected = f"at most the {offer.context_tokens} that endpoints.{name} reads ({offer.url})"
            raise Refusal("data.max_length_tokens", f"rows of {reads} tokens", expected, do)
    silent = {n: int(read_rows(strategy, n, np.asarray([longest]))[0]) for n, offer in offers.items() if offer.context_tokens is None}
    return [f"the server of endpoint {n!r} does not tell its context; it reads rows of up to {most} tokens." for n, most in silent.items()]


def scoring_rooms(
    endpoints: Mapping[str, EndpointConfig], offers: Mapping[str, Offer | WritingOffer], people: Cast
) -> dict[str, int | None]:
    """Longest row that each endpoint scores, as its server or its network tells; None where neither does."""
    own = {name: longest_scored(config, people.teachers[name].context) for name, config in endpoints.items() if name in people.teachers}
    return own | {name: offer.context_tokens for name, offer in offers.items()}


def _offer(name: str, config: EndpointConfig, requests: Sequence[ScoreRequest], sampling: Sampling | None) -> Offer | WritingOffer | None:
    """Of one that writes and scores, how it scores."""
    if sampling is not None and not config.writes:
        do = f"Name a saved model in endpoints.{name}.model, or a server (engine: openai)."
        raise Refusal(f"endpoints.{name}.engine", f"{config.engine!r}, which does not write text", "an engine that does", do)
    try:
        writing = None if sampling is None else probe_writer(config)
        if writing is not None and sampling is not None:
            writing.check(sampling)
        if sampling is not None and not requests:
            return writing
        offer = probe(config, max([1, *(r.top_k for r in requests)]))
        if offer is not None:
            for request in requests:
                offer.check(request.kind, request.top_k)
    except Unfit as error:
        raise Refusal(f"endpoints.{name}.{error.field}", error.got, error.expected, error.do) from error
    return offer
