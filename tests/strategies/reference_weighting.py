"""Float64 references for weights, borders and temperatures of single tokens, written from the formulas.

z `(N, V)` logits, p and q `(N, M)` probabilities, labels `(N,)`.
"""

from __future__ import annotations

import numpy as np
import torch

from tests.strategies.reference import Array, Ids, kl, softmax


def entropy(p: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(-np.where(p > 0, p * np.log(p), 0.0).sum(-1))


def scores(z_q: Array, z_p: Array) -> dict[str, Array]:
    """Everything by which tokens are chosen."""
    q, p = softmax(z_q), softmax(z_p)
    return {
        "student-entropy": entropy(q),
        "teacher-entropy": entropy(p),
        "student-confidence": q.max(-1),
        "teacher-confidence": p.max(-1),
        "entropy-gap": entropy(q) - entropy(p),
        "distance": 0.5 * np.abs(p - q).sum(-1),
    }


def without(p: Array, at: Ids) -> Array:
    """The other outcomes, `(N, M - 1)`, renormalised."""
    others = np.stack([np.delete(row, i) for row, i in zip(p, at, strict=True)])
    return np.asarray(others / others.sum(-1, keepdims=True))


def dkd(p: Array, q: Array, at: Ids) -> tuple[Array, Array]:
    """TCKD and NCKD of KL(p || q) split at outcome `at`."""
    here = np.arange(len(p)), at
    pair = [np.stack([a[here], 1 - a[here]], -1) for a in (p, q)]
    return kl(pair[0], pair[1]), kl(without(p, at), without(q, at))


def atkd(z_q: Array, z_p: Array, labels: Ids, weights: Array, easy: Array, share: float) -> float:
    """n times `share mean_easy(NCKD) + (1 - share) mean_hard(TCKD + NCKD)` over tokens of weight, each token by its own."""
    tckd, nckd = dkd(softmax(z_p), softmax(z_q), labels)
    live = weights != 0
    total = 0.0
    for by, group, value in ((share, live & easy, nckd), (1 - share, live & ~easy, tckd + nckd)):
        if group.any():
            total += by * live.sum() * (weights * value)[group].sum() / group.sum()
    return total


def hellinger(p: Array, q: Array) -> Array:
    """From its other form, `sqrt(1 - sum sqrt(p q))`."""
    return np.asarray(np.sqrt(np.maximum(0.0, 1.0 - np.sqrt(p * q).sum(-1))))


def adakd(z_q: Array, z_p: Array, weights: Array, kept: Array, temperatures: Array) -> tuple[float, Array]:
    """`sum over kept of w T^2 KL(p_T || q_T)`, T of each token, and its gradient `w T (q_T - p_T)`."""
    warm = temperatures[:, None]
    p, q = softmax(z_p / warm), softmax(z_q / warm)
    by = weights * kept
    return float((by * temperatures**2 * kl(p, q)).sum()), np.asarray((by * temperatures)[:, None] * (q - p))


def by_autograd(function: object, z: Array) -> tuple[float, Array]:
    """Value and gradient of a torch function of float64 logits."""
    assert callable(function)
    leaf = torch.from_numpy(np.asarray(z, dtype=np.float64)).requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient.numpy()
