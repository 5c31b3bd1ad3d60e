"""Float64 references of transport distances, written from the formulas; probabilities `(N, M)`."""

from __future__ import annotations

import numpy as np

from tests.strategies.reference import Array


def sorted_distance(p: Array, q: Array) -> Array:
    """`sum |sort p - sort q|` per row; the shorter side is filled with zeros."""
    wide = max(p.shape[1], q.shape[1])
    rows = []
    for a, b in zip(p, q, strict=True):
        first, second = (sorted([*row, *[0.0] * (wide - len(row))], reverse=True) for row in (a, b))
        rows.append(sum(abs(x - y) for x, y in zip(first, second, strict=True)))
    return np.asarray(rows)


def sinkhorn(p: Array, q: Array, masses: Array, regularisation: float, iterations: int) -> float:
    """`sum P C` after alternate scalings of rows and columns of `exp(-C / regularisation)` to `masses`."""
    cost = np.abs(p[:, None, :] - q[None, :, :]).sum(-1)
    plan = np.exp(-cost / regularisation)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdims=True) * masses[:, None]
        plan = plan / plan.sum(0, keepdims=True) * masses[None, :]
    return float((plan * cost).sum())


def slope(function: object, z: Array, step: float = 1e-6) -> Array:
    """Central differences of a scalar function of `(N, V)`."""
    assert callable(function)
    gradient = np.zeros_like(z)
    for at in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[at] += step
        down[at] -= step
        gradient[at] = (function(up) - function(down)) / (2 * step)
    return gradient
