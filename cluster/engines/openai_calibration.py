"""Compares what a server says with a forward of the same weights on this machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.config import OpenAIEndpoint, TransformersEndpoint
from cluster.engines import Columns, Kind
from cluster.offers import Unfit

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """Asks for the log-probability of every loss token itself."""

    kind: Kind = "per-token"
    top_k: int = 0
    draws: int = 0
    exponent: float = 1.0


def check_calibration(config: OpenAIEndpoint, vocabulary: int, columns: Columns, logprob: NDArray[np.float64], threads: int | None) -> None:
    """Scores the bundle's first rows with `local_model`, which is then let go, and compares them with the server's `logprob` `(N,)`.

    `Unfit` when they differ by more than `max_calibration_error` on average.
    """
    from cluster.engines.transformers import TransformersEngine

    assert config.local_model is not None
    some = first_rows(columns, config.calibration_rows)
    local = TransformersEngine(TransformersEndpoint(model=config.local_model, max_dropped_mass=1.0), vocabulary, threads)
    ours = local.score(some, Labels())["logprob"].astype(np.float64)
    theirs = logprob[: len(ours)]
    known = np.isfinite(ours) & np.isfinite(theirs)
    error = float(np.abs(theirs - ours)[known].mean()) if known.any() else 0.0
    where = f"on {int(known.sum())} tokens of {len(some['lengths'])} rows"
    _log.info("%s at %s differs from %s by %.4f nats a token %s", config.model, config.base_url, config.local_model, error, where)
    if not error <= config.max_calibration_error:
        raise Unfit(
            "max_calibration_error",
            f"log-probabilities of {config.model!r} at {config.base_url} that differ from those of {config.local_model!r} by "
            f"{error:.4g} nats on average {where}",
            f"at most {config.max_calibration_error:g}",
            "Serve the same weights, with log-probabilities at temperature 1 (vLLM: --logprobs-mode raw_logprobs); raise it only for "
            "a server that quantises.",
        )


def first_rows(columns: Columns, count: int) -> Columns:
    """The rows up to the `count`-th that has loss tokens."""
    lengths, mask = columns["lengths"].astype(np.int64), columns["loss_mask"]
    ends = np.cumsum(lengths)
    busy = np.flatnonzero([mask[end - length : end].any() for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)])
    rows = int(busy[min(count, len(busy)) - 1]) + 1 if len(busy) else 0
    tokens = int(lengths[:rows].sum())
    return {"tokens": columns["tokens"][:tokens], "lengths": columns["lengths"][:rows], "loss_mask": mask[:tokens]}
