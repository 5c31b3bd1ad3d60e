"""Float64 references for objectives of sampled tokens and of whole sequences, written from the formulas.

Shapes: z `(N, V)` logits, labels and rows `(N,)`. Gradients are with respect to student logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.strategies.reference import Array, kl, softmax


def label_logprobs(z: Any, labels: Any, temperature: float = 1.0) -> Array:
    return np.asarray(np.log(softmax(z, temperature))[np.arange(len(z)), labels])


def label_gradient(z: Any, labels: Any, temperature: float = 1.0) -> Array:
    """d log q(label) / d z = (onehot - q) / T, `(N, V)`."""
    gradient = -softmax(z, temperature)
    gradient[np.arange(len(z)), labels] += 1.0
    return np.asarray(gradient / temperature)


def reverse_kl_gradient(z_q: Any, z_p: Any) -> Array:
    q, p = softmax(z_q), softmax(z_p)
    return np.asarray(q * (np.log(q) - np.log(p) - kl(q, p)[:, None]))


def to_go(rewards: Any, rows: Any, discount: float) -> Array:
    """The definition, token by token."""
    result = np.zeros(len(rewards))
    for t in range(len(rewards)):
        ahead = [u for u in range(t, len(rewards)) if rows[u] == rows[t]]
        result[t] = sum(discount**k * rewards[u] for k, u in enumerate(ahead))
    return result


def sequence_kl(q1: Any, q2: Any, p1: Any, p2: Any) -> Any:
    """KL(q || p) over sequences of two tokens, of probabilities of the first `(V,)` and of the second given it `(V, V)`. Tensors."""
    later = (q2 * (q2.log() - p2.log())).sum(-1)
    return (q1 * (q1.log() - p1.log() + later)).sum()


def long_term(rewards: Any, rows: Any, live: Any, discount: float, later_only: bool, normalised: bool) -> Array:
    """Discounted sum of `rewards` from each token on, or from the next one on; divided by how many live tokens it is of, if any."""
    result = np.zeros(len(rewards))
    for t in range(len(rewards)):
        ahead = [(k, u) for k, u in enumerate(u for u in range(t, len(rewards)) if rows[u] == rows[t]) if k or not later_only]
        count = sum(bool(live[u]) for _, u in ahead)
        result[t] = sum(discount**k * rewards[u] for k, u in ahead if live[u]) / (max(count, 1) if normalised else 1)
    return result
