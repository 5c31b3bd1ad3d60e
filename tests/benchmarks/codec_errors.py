"""KL and gradient error of k stored log-probabilities against the whole distribution, in closed form and float64.

Both sides of a comparison are treated alike: what the stored ids leave of the mass, at least `TAIL_FLOOR`, is the tail, and
everything is normalised to 1. KL is of p to that, the tail spread evenly over the other ids. The gradient is that of forward KL
with one bucket for the tail (`strategies.signals.TopK`) by the student's logits, against `q - p` of the whole distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.signals import TAIL_FLOOR
from tests.benchmarks.codec_material import Distributions

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    kl: float
    """Mean over tokens of KL(p || p_hat), nats."""
    gradient: float
    """`||g - g*|| / ||g*||` over all tokens and logits together."""


def errors(of: Distributions, ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> Errors:
    """Of `(N, k)` decoded answers that name the first k ids of `of`, in any order."""
    kept = ids.shape[1]
    true, decoded = of.ids[:, :kept].argsort(1), ids.argsort(1)
    if not np.array_equal(np.take_along_axis(of.ids[:, :kept], true, 1), np.take_along_axis(ids, decoded, 1)):
        raise ValueError("decoded ids are not the encoded ones")
    log_p, log_q = (np.take_along_axis(a[:, :kept], true, 1).astype(np.float64) for a in (of.logprobs, of.student))
    log_hat, tail_hat = normalised(np.take_along_axis(logprobs, decoded, 1).astype(np.float64))
    hat = np.exp(log_hat)
    tails = _tails(of, kept)
    kl = (np.exp(log_p) * (log_p - log_hat)).sum(1) + tails["plogp"] - tails["p"] * np.log(tail_hat / max(of.vocabulary - kept, 1))
    scale = tail_hat / np.maximum(tails["q"], 1e-30)
    beyond = tails["pp"] - 2 * scale * tails["pq"] + scale**2 * tails["qq"]
    wrong = ((np.exp(log_p) - hat) ** 2).sum(1) + np.maximum(beyond, 0.0)
    right = ((np.exp(log_q) - np.exp(log_p)) ** 2).sum(1) + tails["qq"] - 2 * tails["pq"] + tails["pp"]
    return Errors(float(kl.mean()), float(np.sqrt(wrong.sum() / right.sum())))


def _tails(of: Distributions, kept: int) -> dict[str, Floats]:
    """Sums over all ids but the first `kept`, added up from small to large: none is the difference of two large ones."""
    log_p, log_q = of.logprobs[:, kept:].astype(np.float64), of.student[:, kept:].astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    inside = {"p": p, "q": q, "plogp": p * log_p, "pp": p * p, "pq": p * q, "qq": q * q}
    return {name: terms.sum(1) + of.beyond[name] for name, terms in inside.items()}


def normalised(logprobs: Floats) -> tuple[Floats, Floats]:
    """Log-probabilities `(N, k)` and the tail's mass `(N,)` that add up to 1."""
    mass = np.exp(logprobs).sum(1)
    tail = np.maximum(1.0 - mass, TAIL_FLOOR)
    return logprobs - np.log(mass + tail)[:, None], tail / (mass + tail)
