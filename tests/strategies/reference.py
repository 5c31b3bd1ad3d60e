"""Float64 references in numpy, written from the formulas and not from the code under test.

Shapes: z `(N, V)` logits, ids `(N, K)`, probabilities `(N, M)`. Each divergence comes with its gradient with respect to
student logits, derived by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]


def softmax(z: Any, temperature: float = 1.0) -> Array:
    tempered = np.asarray(z, dtype=np.float64) / temperature
    weights = np.exp(tempered - tempered.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def kl(p: Array, q: Array) -> Array:
    """KL(p || q) per row, 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1))


def top(z: Any, k: int) -> tuple[Ids, Array]:
    """Ids of the k largest logits, falling, and their log-probabilities at temperature 1, rounded to float32 as a cache holds them."""
    p = softmax(z)
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :k]
    return ids, np.log(np.take_along_axis(p, ids, -1)).astype(np.float32).astype(np.float64)


def teacher_bucket(logprobs: Array, vocabulary: int, temperature: float) -> Array:
    """K + 1 outcomes from cached log-probabilities at temperature 1: `p_i^(1/T)` and `(V-K)^(1-1/T) r^(1/T)`, normalised."""
    p, kept = np.exp(logprobs), logprobs.shape[-1]
    if kept == vocabulary:
        weights = p ** (1 / temperature)
    else:
        rest = np.maximum(1.0 - p.sum(-1, keepdims=True), 1e-9)
        tail = (vocabulary - kept) ** (1 - 1 / temperature) * rest ** (1 / temperature)
        weights = np.concatenate([p ** (1 / temperature), tail], -1)
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def student_bucket(z: Any, ids: Ids, temperature: float) -> Array:
    """Exact tempered student mass of each kept id and of all others together."""
    q = softmax(z, temperature)
    kept = np.take_along_axis(q, ids, -1)
    if ids.shape[-1] == q.shape[-1]:
        return np.asarray(kept)
    outside = q.copy()
    np.put_along_axis(outside, ids, 0.0, -1)
    return np.concatenate([kept, outside.sum(-1, keepdims=True)], -1)


def restricted(weights: Array) -> Array:
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def paired(z_q: Any, ids: Ids, logprobs: Array, temperature: float, tail: str) -> tuple[Array, Array]:
    """(q, p) of the named tail treatment."""
    vocabulary, kept = np.asarray(z_q).shape[-1], ids.shape[-1]
    p, q = teacher_bucket(logprobs, vocabulary, temperature), student_bucket(z_q, ids, temperature)
    if tail == "bucket":
        return q, p
    if tail == "drop":
        return q[:, :kept], p[:, :kept]
    return restricted(q[:, :kept]), restricted(p[:, :kept])


def bucket_kl_gradient(z_q: Any, ids: Ids, logprobs: Array, temperature: float) -> Array:
    """d KL(p || q) / d z_q: on kept ids `(q - p)/T`; elsewhere `(q - p_tail q/q_tail)/T`. `(N, V)`."""
    q_full = softmax(z_q, temperature)
    q, p = paired(z_q, ids, logprobs, temperature, "bucket")
    kept = ids.shape[-1]
    share = p[:, kept:] / q[:, kept:] if p.shape[-1] > kept else np.zeros((len(p), 1))
    gradient = q_full * (1.0 - share)
    np.put_along_axis(gradient, ids, q[:, :kept] - p[:, :kept], -1)
    return np.asarray(gradient / temperature)


def cross_entropy_gradient(z_q: Any, labels: Ids) -> Array:
    gradient = softmax(z_q)
    gradient[np.arange(len(labels)), labels] -= 1.0
    return gradient


@dataclass(frozen=True)
class HeadSums:
    """Sums, scaled loss and gradients of cross-entropy and bucket KL over a linear output head."""

    ce: float
    kd: float
    loss: float
    hidden: Array
    weight: Array
    bias: Array


@dataclass(frozen=True)
class HeadCase:
    """Inputs of one head, float64: hidden `(N, D)`, weight `(V, D)`, bias `(V,)`, the teacher's top tokens, labels."""

    hidden: Array
    weight: Array
    bias: Array
    ids: Ids
    logprobs: Array
    labels: Ids
    ce_weights: Array
    kd_weights: Array


def head_sums(case: HeadCase, temperature: float, ce_scale: float, kd_scale: float) -> HeadSums:
    """The whole `(N, V)` at once: loss = ce_scale sum w CE + kd_scale T^2 sum w KL."""
    z = case.hidden @ case.weight.T + case.bias
    ce = -(case.ce_weights * np.log(softmax(z))[np.arange(len(z)), case.labels]).sum()
    q, p = paired(z, case.ids, case.logprobs, temperature, "bucket")
    kd = temperature**2 * (case.kd_weights * kl(p, q)).sum()
    by_ce = ce_scale * case.ce_weights[:, None] * cross_entropy_gradient(z, case.labels)
    by_kd = kd_scale * temperature**2 * case.kd_weights[:, None] * bucket_kl_gradient(z, case.ids, case.logprobs, temperature)
    by_z = by_ce + by_kd
    return HeadSums(ce, kd, ce_scale * ce + kd_scale * kd, by_z @ case.weight, by_z.T @ case.hidden, by_z.sum(0))
