"""Float64 references of the divergence family, from the definitions: probabilities, plain sums, central differences.

p, q `(N, V)` probabilities; values are `(N,)`. Nothing here takes the routes of the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.strategies.reference import Array, Ids, kl, softmax

Value = Callable[[Array, Array], Array]
"""(q, p) to one number per token."""


def gjsd(q: Array, p: Array, beta: float, rescale: bool = True) -> Array:
    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0.0 else kl(q, p)
    m = beta * p + (1 - beta) * q
    value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return np.asarray(value / (beta * (1 - beta)) if rescale else value)


def skew_fkl(q: Array, p: Array, skew: float) -> Array:
    return kl(p, skew * p + (1 - skew) * q)


def skew_rkl(q: Array, p: Array, skew: float) -> Array:
    return kl(q, skew * q + (1 - skew) * p)


def tvd(q: Array, p: Array) -> Array:
    return np.asarray(0.5 * np.abs(p - q).sum(-1))


def amari(q: Array, p: Array, alpha: float) -> Array:
    return np.asarray((1 - _overlap(q, p, alpha)) / (alpha * (1 - alpha)))


def renyi(q: Array, p: Array, alpha: float) -> Array:
    return np.asarray(np.log(_overlap(q, p, alpha)) / (alpha - 1))


def _overlap(q: Array, p: Array, alpha: float) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(p > 0, p**alpha * q ** (1 - alpha), 0.0).sum(-1))


def akl_share(q: Array, p: Array, mass: float) -> Array:
    """Weight of forward KL, one row at a time: walk down the teacher's choices while their mass is at most `mass`."""
    shares = []
    for student, teacher in zip(q, p, strict=True):
        inside, total, counted = 0.0, float(np.abs(teacher - student).sum()), 0.0
        for place, token in enumerate(sorted(range(len(teacher)), key=lambda v: -teacher[v])):
            counted += teacher[token]
            if place == 0 or counted <= mass:
                inside += abs(teacher[token] - student[token])
        shares.append(inside / total if total > 0 else 0.5)
    return np.asarray(shares)


def akl(q: Array, p: Array, share: Array) -> Array:
    return np.asarray(share * kl(p, q) + (1 - share) * kl(q, p))


def taid_target(z_q: Array, z_p: Array, share: float, temperature: float = 1.0) -> Array:
    return softmax((1 - share) * np.asarray(z_q, dtype=np.float64) + share * np.asarray(z_p, dtype=np.float64), temperature)


def cross(target: Array, q: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(-np.where(target > 0, target * np.log(q), 0.0).sum(-1))


def smoothed_cross_entropy(z: Array, labels: Ids, smoothing: float) -> Array:
    log_q = np.log(softmax(z))
    return np.asarray(-(1 - smoothing) * log_q[np.arange(len(z)), labels] - smoothing * log_q.mean(-1))


def taid_shares(losses: list[float], start: float, end: float, rate: float, inertia: float) -> list[float]:
    """Share after each of the steps with these losses."""
    found, share, momentum, last = [], start, 0.0, math.inf
    for n, loss in enumerate(losses):
        if n > 0:
            momentum = inertia * momentum + (1 - inertia) * (last - loss) / (last + 1e-15)
            wanted = share + rate / (1 + math.exp(-momentum)) * (1 - share)
            share = min(end, max(start + (end - start) * n / len(losses), wanted))
        last = loss
        found.append(share)
    return found


def gradient(value: Callable[[Array], Array], z: Array, step: float = 1e-5) -> Array:
    """d value / d z by central differences, one column of all rows at a time. `(N, V)`."""
    z = np.asarray(z, dtype=np.float64)
    found = np.zeros_like(z)
    for v in range(z.shape[-1]):
        nudge = np.zeros_like(z)
        nudge[:, v] = step
        found[:, v] = (value(z + nudge) - value(z - nudge)) / (2 * step)
    return found


def logit_gradient(value: Value, z_q: Array, z_p: Array, temperature: float = 1.0) -> Array:
    """Of `value(softmax(z_q / T), softmax(z_p / T))` with respect to z_q."""
    p = softmax(z_p, temperature)
    return gradient(lambda z: value(softmax(z, temperature), p), z_q)
