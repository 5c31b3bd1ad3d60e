"""What can be said of a vLLM endpoint before it loads, and without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from cluster.engines import Kind, Request, Sampling
from cluster.offers import Unfit
from cluster.vllm_settings import ALL, VllmEndpoint

KINDS: frozenset[Kind] = frozenset({"topk", "dense", "per-token"})
TEMPERATURES = (0.01, 2.0)
"""Besides 0. vLLM refuses what is above and silently raises what is below."""


def check_package() -> None:
    """`Unfit` where vLLM is not installed."""
    if find_spec("vllm") is None:
        do = "pip install -e '.[vllm]' on every node, or take engine: transformers."
        raise Unfit("engine", "no package 'vllm'", "the package that this engine runs on", do)


def check_gpus(config: VllmEndpoint) -> None:
    """`Unfit` for an actor that holds too few GPUs."""
    gpus, needed = config.resources.gpus, config.tensor_parallel
    if not gpus:
        do = f"Set its resources.gpus={needed}, or take engine: transformers, which also runs on CPUs."
        raise Unfit("resources.gpus", "0, for an engine that runs on GPUs", f"{needed} for each of its actors", do)
    if needed > 1 and gpus < needed:
        do = f"Set its resources.gpus={needed}, or lower tensor_parallel."
        raise Unfit("resources.gpus", f"{gpus:g}, for a model that is split over {needed}", f"{needed} for each of its actors", do)


def check_request(config: VllmEndpoint, request: Request, usable: int) -> None:
    """`Unfit` when it does not give this of a token, of `usable` ids."""
    if request.kind not in KINDS:
        do = "Take topk, dense or per-token of this endpoint, or set its engine to transformers."
        raise Unfit("engine", f"one that is asked for {request.kind!r}", " or ".join(sorted(KINDS)), do)
    kept = {"topk": request.top_k, "dense": usable}.get(request.kind, 0)
    if config.max_logprobs != ALL and kept > config.max_logprobs:
        what = f"the {usable} ids of a whole distribution" if request.kind == "dense" else f"the {kept} of top_k"
        do = f"Raise it to {kept} (-1 for all), or ask for fewer ids."
        raise Unfit("max_logprobs", str(config.max_logprobs), what, do)


def check_sampling(sampling: Sampling) -> None:
    """`Unfit` for a temperature that vLLM does not take."""
    least, most = TEMPERATURES
    if sampling.temperature and not least <= sampling.temperature <= most:
        do = "Change strategy.temperature, or take engine: transformers."
        raise Unfit("engine", f"one that writes at temperature {sampling.temperature:g}", f"0, or {least:g} to {most:g}", do)


def longest_scored(config: VllmEndpoint, context: int | None) -> int | None:
    """Longest row that it scores, one token of its context being written besides; `context` is what the model was made for."""
    room = config.context_tokens or context
    return None if room is None else room - 1


def check_length(config: VllmEndpoint, longest: int, context: int | None, scores: bool) -> None:
    """`Unfit` when rows of `longest` tokens do not fit; `context` is what the model was made for. Scoring needs one token more."""
    room = config.context_tokens or context
    needed = longest + (1 if scores else 0)
    if room is not None and needed > room:
        why = "rows of {} tokens and the one more that scoring needs" if scores else "prompts and texts of {} tokens"
        do = f"Set data.max_length_tokens={room - needed + longest} or less, or raise context_tokens where the model allows it."
        raise Unfit("context_tokens", str(room), f"room for {why.format(longest)}", do)


def check(config: VllmEndpoint, requests: Sequence[Request], samplings: Sequence[Sampling], usable: int) -> None:
    """`Unfit` when its actors cannot run here, or do not give what is asked of them."""
    check_package()
    check_gpus(config)
    for request in requests:
        check_request(config, request, usable)
    for sampling in samplings:
        check_sampling(sampling)
