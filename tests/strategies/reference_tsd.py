"""Float64 references for TSD-KD's terms, written from the formulas, row by row and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.strategies.reference import Array, softmax
from tests.strategies.reference_weighting import entropy


def order_probability(scores: Sequence[float]) -> float:
    """Of drawing outcomes in the order given, each time among those left with probabilities in proportion to exp of the scores."""
    probability, left = 1.0, [float(np.exp(s)) for s in scores]
    while left:
        probability *= left[0] / sum(left)
        left = left[1:]
    return probability


def ranking_loss(z: Tensor, z_p: Array, candidates: int) -> Tensor:
    """`-log` of the same for the first tokens of `z` `(V,)` in the order of `z_p` `(V,)`."""
    proposed = np.argsort(-z.detach().numpy(), kind="stable")[:candidates]
    ranked = proposed[np.argsort(-z_p[proposed], kind="stable")]
    return -sum((torch.log(z[i].exp() / z[ranked[at:].copy()].exp().sum()) for at, i in enumerate(ranked)), torch.zeros(()))


def opening(doubts: Array, rows: Any, share: float) -> Array:
    """1 on the tokens of each row up to the one with which the share of its sum is reached."""
    found = np.zeros(len(doubts))
    for row in np.unique(rows):
        passed = 0.0
        for t in np.flatnonzero(np.asarray(rows) == row):
            found[t] = passed < share * doubts[np.asarray(rows) == row].sum()
            passed += doubts[t]
    return found


def doubtful(z: Array, rows: Any, live: Array, quantile: float) -> Array:
    """1 on the live tokens whose entropy is at least the quantile of the live ones of their row."""
    doubts, found = entropy(softmax(z)), np.zeros(len(z))
    for row in np.unique(np.asarray(rows)[live]):
        here = live & (np.asarray(rows) == row)
        found[here] = doubts[here] >= np.quantile(doubts[here], quantile)
    return found


def entropy_gradient(z: Array) -> Array:
    """`d H(q) / d z = -q (log q + H)`."""
    q = softmax(z)
    return np.asarray(-q * (np.log(q) + entropy(q)[:, None]))
