"""Checks of endpoints that answer in actors of their own: what those run on, what they give, and how long rows may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.config import EndpointConfig
from cluster.endpoints import check_actors
from cluster.offers import Unfit
from orchestrator.checks.networks import Cast
from orchestrator.data import PreparedData
from orchestrator.errors import Refusal
from orchestrator.rollouts import live_authors, longest_read
from strategies.core import Sampling, ScoreRequest, Strategy
from strategies.stages.rollout import rollouts


def check_stages(
    endpoints: Mapping[str, EndpointConfig],
    asked: Mapping[str, Sequence[ScoreRequest]],
    strategy: Strategy,
    people: Cast,
    data: PreparedData,
) -> None:
    """`Refusal` for one of `endpoints` that cannot do what the strategy's stages want; `asked` is what they score with."""
    written = rollouts(strategy.stages)
    longest = max(data.train.longest_tokens, data.held_out.longest_tokens, *(s.longest_tokens for s in written))
    for name, config in endpoints.items():
        reads = longest_read(strategy, name, longest)
        check_endpoint(name, config, people, asked.get(name, ()), _samplings(live_authors(strategy), name), reads)


def _samplings(writing: Mapping[str, Sampling], name: str) -> list[Sampling]:
    return [writing[name]] if name in writing else []


def check_endpoint(
    name: str, config: EndpointConfig, people: Cast, requests: Sequence[ScoreRequest], samplings: Sequence[Sampling], longest: int
) -> None:
    """`Refusal` when its actors cannot answer `requests` about rows, or write texts, of up to `longest` tokens."""
    network = people.teachers.get(name)
    try:
        check_actors(config, requests, samplings, people.usable(name), longest, network.context if network else None)
    except Unfit as error:
        raise Refusal(f"endpoints.{name}.{error.field}", error.got, error.expected, error.do) from error
