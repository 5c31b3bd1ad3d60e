"""From an endpoint's settings to the engine that answers for it, and what every answer must look like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.config import (
    EndpointConfig,
    FakeEndpoint,
    OpenAIEndpoint,
    ReplayEndpoint,
    StoreEndpoint,
    VerifierEndpoint,
    VllmEndpoint,
)
from cluster.engines import Columns, Engine, Request, Sampling
from cluster.offers import Offer, Unfit, WritingOffer

DOOR_RETRIES = 2
"""Repetitions of a probe's requests: a person waits for it."""


def make_engine(config: EndpointConfig, vocabulary: int | None = None, threads: int | None = None) -> Engine:
    """Loads the engine of `config` into this process; packages of an engine are imported only when it is chosen.

    `vocabulary` is how many ids, from 0, an answer may name; everything beyond is dropped and the rest renormalised.
    `threads` sets this process's compute threads.
    """
    if isinstance(config, FakeEndpoint):
        from cluster.engines.fake import FakeEngine

        return FakeEngine(min(config.vocabulary, vocabulary or config.vocabulary), config.seconds_per_bundle)
    if isinstance(config, StoreEndpoint):
        from cluster.engines.store import StoreEngine

        return StoreEngine(config)
    if isinstance(config, ReplayEndpoint):
        from cluster.engines.replay import ReplayEngine

        return ReplayEngine(config)
    if isinstance(config, VerifierEndpoint):
        from cluster.engines.verifier import VerifierEngine

        return VerifierEngine(config)
    if isinstance(config, OpenAIEndpoint):
        from cluster.engines.openai import OpenAIEngine

        return OpenAIEngine(config, vocabulary, threads)
    if isinstance(config, VllmEndpoint):
        from cluster.engines.vllm import VllmEngine

        return VllmEngine(config, vocabulary, threads)
    from cluster.engines.transformers import TransformersEngine

    return TransformersEngine(config, vocabulary, threads)


def probe(config: EndpointConfig, top_k: int = 1) -> Offer | None:
    """What the server of an endpoint was found to give, up to `top_k` ids of a token; None for one that answers in its own actors.

    Sends a few tiny requests. `cluster.offers.Unfit` when it cannot be reached or cannot score.
    """
    if not isinstance(config, OpenAIEndpoint):
        return None
    from cluster.engines.openai_client import Server
    from cluster.engines.openai_probe import probe_server

    server = Server(config, max_retries=min(DOOR_RETRIES, config.max_retries))
    try:
        return probe_server(server, config, top_k)[0]
    finally:
        server.close()


def probe_writer(config: EndpointConfig) -> WritingOffer | None:
    """How the server of an endpoint was found to write; None for one that writes in its own actors.

    Sends a few tiny requests. `cluster.offers.Unfit` when it cannot be reached or does not write.
    """
    if not isinstance(config, OpenAIEndpoint):
        return None
    from cluster.engines.openai_client import Server
    from cluster.engines.openai_probe import probe_writing

    server = Server(config, max_retries=min(DOOR_RETRIES, config.max_retries))
    try:
        return probe_writing(server, config)[0]
    finally:
        server.close()


def check_actors(
    config: EndpointConfig, requests: Sequence[Request], samplings: Sequence[Sampling], usable: int, longest: int, context: int | None
) -> None:
    """`cluster.offers.Unfit` when an engine that loads a model of its own lacks what it runs on, or does not answer `requests` about
    `usable` ids or write by `samplings`, of rows and texts of up to `longest` tokens, and when a verifier's function cannot be imported
    here. `context` is what the model was made for."""
    if isinstance(config, VerifierEndpoint):
        _check_verifier(config)
    if isinstance(config, VllmEndpoint):
        from cluster.engines.vllm_door import check, check_length

        check(config, requests, samplings, usable)
        check_length(config, longest, context, scores=bool(requests))


def _check_verifier(config: VerifierEndpoint) -> None:
    """`cluster.offers.Unfit` when its function, where it has one, cannot be imported here."""
    if config.function is None:
        return
    from cluster.verifiers import VerifierFailed
    from cluster.verifiers.process import JudgeProcess

    try:
        JudgeProcess({"kind": config.kind, "function": config.function}, config.timeout_seconds).close()
    except VerifierFailed as error:
        do = "Correct the name, or put its module where Python finds it: in the folder of the command, or in an installed package."
        raise Unfit("function", str(error), "a function that can be imported", do) from error


def longest_scored(config: EndpointConfig, context: int | None) -> int | None:
    """Longest row that an endpoint's own actors score with a model that was made for `context` tokens; None where nobody says."""
    if not isinstance(config, VllmEndpoint):
        return context
    from cluster.engines.vllm_door import longest_scored

    return longest_scored(config, context)


def check_scores(columns: Columns, scores: Columns, request: Request, vocabulary: int) -> None:
    """`ValueError` saying which promise of `Engine.score` the answer breaks."""
    tokens = int(np.count_nonzero(columns["loss_mask"]))
    for name, (width, dtype) in _promised(request, vocabulary).items():
        got, size = scores.get(name), tokens * width if name != "dropped_mass" else 1
        if got is None or got.shape != (size,) or got.dtype != dtype:
            found = "nothing" if got is None else f"{got.shape} {got.dtype}"
            raise ValueError(f"column {name!r} of the scores: got {found}; expected ({size},) {dtype}")
    _check_cost(scores, "scores")
    if "ids" in scores:
        _check_ids(scores, tokens, request, vocabulary)


def check_written(columns: Columns, written: Columns, samples: int, vocabulary: int) -> None:
    """`ValueError` saying which promise of `Writer.write` the texts break."""
    texts, tokens = len(columns["lengths"]) * samples, int(written["lengths"].sum())
    promised = {"tokens": (tokens, "int32"), "lengths": (texts, "int32"), "row_id": (texts, "int64"), "sample": (texts, "int32")}
    for name, (size, dtype) in {**promised, "finished": (texts, "uint8"), "logprobs": (tokens, "float32")}.items():
        got = written.get(name)
        if got is None or got.shape != (size,) or got.dtype != dtype:
            found = "nothing" if got is None else f"{got.shape} {got.dtype}"
            raise ValueError(f"column {name!r} of the texts: got {found}; expected ({size},) {dtype}")
    _check_cost(written, "texts")
    if tokens and not (written["tokens"].min() >= 0 and written["tokens"].max() < vocabulary):
        raise ValueError(f"tokens of the texts: got {written['tokens'].min()} to {written['tokens'].max()}; expected 0 to {vocabulary - 1}")


def _check_cost(columns: Columns, what: str) -> None:
    cost = columns.get("cost")
    if cost is not None and not (cost.shape == (1,) and cost.dtype == np.float32 and cost[0] >= 0):
        raise ValueError(f"column 'cost' of the {what}: got {cost.shape} {cost.dtype}; expected (1,) float32, not negative")


def _promised(request: Request, vocabulary: int) -> dict[str, tuple[int, str]]:
    """Numbers per token and dtype of every column but hidden states, whose width only the model knows."""
    kept = request.top_k if request.kind == "topk" else request.draws
    ids = {"ids": (kept, "int32"), "logprobs": (kept, "float32")}
    columns: dict[str, dict[str, tuple[int, str]]] = {
        "topk": ids,
        "sampled": {**ids, "weights": (kept, "float32")},
        "dense": {"dense": (vocabulary, "float32")},
        "among": {"among": (1, "float32")},
    }
    always = {"dropped_mass": (1, "float32")} | ({} if request.kind == "hidden" else {"logprob": (1, "float32")})
    return columns.get(request.kind, {}) | always


def _check_ids(scores: Columns, tokens: int, request: Request, vocabulary: int) -> None:
    if not tokens:
        return
    ids, logprobs = scores["ids"].reshape(tokens, -1), scores["logprobs"].reshape(tokens, -1)
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"ids of the scores: got {ids.min()} to {ids.max()}; expected 0 to {vocabulary - 1}")
    if not np.isfinite(logprobs).all():
        raise ValueError("logprobs of the scores: got numbers that are not finite; expected natural logarithms of probabilities")
    if request.kind != "topk":
        return
    if (np.diff(logprobs, axis=-1) > 0).any():
        raise ValueError("logprobs of the scores: got rising values; expected every position sorted by falling probability")
    mass = np.exp(logprobs.astype(np.float64)).sum(-1)
    if (mass > 1.001).any():
        raise ValueError(f"logprobs of the scores: got a total probability of {mass.max():.4f}; expected at most 1")
