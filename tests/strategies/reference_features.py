"""Float64 references in numpy for distances between inner states, written from the formulas, token by token.

Gradients are central differences of the references, so nothing is shared with the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mse(mine: Array, theirs: Array) -> Array:
    """`1/W sum_d (mine_d - theirs_d)^2`."""
    return np.asarray([sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x) for x, y in zip(mine, theirs, strict=True)])


def cosine(mine: Array, theirs: Array) -> Array:
    """`1 - a.b / (|a| |b|)`."""
    return np.asarray([1 - np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)) for a, b in zip(mine, theirs, strict=True)])


def gram(mine: Array, theirs: Array, rows: Any) -> Array:
    """Of each token, the mean over tokens of its row of the squared difference of cosines."""
    found = []
    for i, row in enumerate(rows):
        others = [j for j, other in enumerate(rows) if other == row]
        gaps = [(cosine(mine[i : i + 1], mine[j : j + 1]) - cosine(theirs[i : i + 1], theirs[j : j + 1]))[0] ** 2 for j in others]
        found.append(np.mean(gaps))
    return np.asarray(found)


def relation(states: Array, place: int, row: Any, heads: int) -> list[Array]:
    """`softmax_j (x_i . x_j / sqrt(d))` of one place over the earlier places of its row, itself included, head by head."""
    width = states.shape[-1] // heads
    earlier = [j for j in range(place + 1) if row[j] == row[place]]
    found = []
    for head in range(heads):
        x = states[:, head * width : (head + 1) * width]
        weights = np.exp([np.dot(x[place], x[j]) / np.sqrt(width) for j in earlier])
        found.append(weights / weights.sum())
    return found


def relation_kl(mine: Array, theirs: Array, places: Any, row: Any, heads: int) -> Array:
    """Mean over heads of `sum_j p_j log(p_j / q_j)`, of each place."""
    found = []
    for place in places:
        pairs = zip(relation(theirs, place, row, heads), relation(mine, place, row, heads), strict=True)
        found.append(np.mean([np.sum(p * np.log(p / q)) for p, q in pairs]))
    return np.asarray(found)


def slope(function: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """The gradient of a scalar function by central differences."""
    found = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        found[place] = (function(up) - function(down)) / (2 * step)
    return found
