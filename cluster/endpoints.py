"""From an endpoint's settings to the engine that answers for it, and what every answer must look like."""

from __future__ import annotations

import numpy as np

from cluster.config import EndpointConfig, FakeEndpoint
from cluster.engines import Columns, Engine


def make_engine(config: EndpointConfig, vocabulary: int | None = None, threads: int | None = None) -> Engine:
    """Loads the engine of `config` into this process; packages of an engine are imported only when it is chosen.

    `vocabulary` is how many ids, from 0, an answer may name; everything beyond is dropped and the rest renormalised.
    `threads` sets this process's compute threads.
    """
    if isinstance(config, FakeEndpoint):
        from cluster.engines.fake import FakeEngine

        return FakeEngine(min(config.vocabulary, vocabulary or config.vocabulary), config.seconds_per_bundle)
    from cluster.engines.transformers import TransformersEngine

    return TransformersEngine(config, vocabulary, threads)


def check_scores(columns: Columns, scores: Columns, top_k: int, vocabulary: int) -> None:
    """`ValueError` saying which promise of `Engine.score` the answer breaks."""
    tokens = int(np.count_nonzero(columns["loss_mask"]))
    expected = {"ids": (tokens * top_k, "int32"), "logprobs": (tokens * top_k, "float32"), "logprob": (tokens, "float32")}
    for name, (size, dtype) in {**expected, "dropped_mass": (1, "float32")}.items():
        got = scores.get(name)
        if got is None or got.shape != (size,) or got.dtype != dtype:
            found = "nothing" if got is None else f"{got.shape} {got.dtype}"
            raise ValueError(f"column {name!r} of the scores: got {found}; expected ({size},) {dtype}")
    ids, logprobs = scores["ids"].reshape(tokens, top_k), scores["logprobs"].reshape(tokens, top_k)
    if tokens and (ids.min() < 0 or ids.max() >= vocabulary):
        raise ValueError(f"ids of the scores: got {ids.min()} to {ids.max()}; expected 0 to {vocabulary - 1}")
    if not np.isfinite(logprobs).all():
        raise ValueError("logprobs of the scores: got numbers that are not finite; expected natural logarithms of probabilities")
    if (np.diff(logprobs, axis=-1) > 0).any():
        raise ValueError("logprobs of the scores: got rising values; expected every position sorted by falling probability")
    mass = np.exp(logprobs.astype(np.float64)).sum(-1)
    if (mass > 1.001).any():
        raise ValueError(f"logprobs of the scores: got a total probability of {mass.max():.4f}; expected at most 1")
