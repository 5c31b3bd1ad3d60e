"""What an engine says about loss tokens: numbers of every asked kind, made from hidden states a piece at a time.

One home for the arithmetic, so that a teacher in a stage and one inside a training worker say the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.causal_lm import OutputHead
from cluster.engines import Request

LOGITS_AT_ONCE = 1 << 20
"""Logits that exist at one time on a CPU: 4 MiB of float32 stay near the cores. A GPU gets 64 times as many."""
TOPK_SHARE = 64
"""torch's `topk` on a CPU sorts partially while k is at most this fraction of a row."""


def answer(
    hidden: Tensor, head: OutputHead, labels: Tensor, keys: Tensor, request: Request, usable: int, wanted: Tensor | None = None
) -> dict[str, Tensor]:
    """The columns of `request` for n loss tokens, `(n, ...)` each; `dropped` `(n,)` is the mass outside `usable` ids, of hidden
    states that of the first tokens alone, for which the head is applied.

    `hidden` `(n, D)` are the states that predict `labels` `(n,)`; `keys` `(n,)` int64 seed the draws of each token; `wanted` `(B,)` int64
    are the ids that `among` is asked about.
    """
    if request.kind == "hidden":
        return {"hidden": hidden, "dropped": _dropped_first(hidden, head, usable)}
    pieces = [
        _piece(h, head, own, key, request, usable, wanted)
        for h, own, key in zip(*(t.split(piece_tokens(hidden.device, len(head.weight))) for t in (hidden, labels, keys)), strict=True)
    ]
    return {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]} if pieces else {}


def _dropped_first(hidden: Tensor, head: OutputHead, usable: int) -> Tensor:
    """`(n,)`: the mass outside `usable` ids of as many tokens as make one piece, and 0 for the others."""
    dropped = torch.zeros(len(hidden), device=hidden.device)
    if usable < len(head.weight):
        first = slice(piece_tokens(hidden.device, len(head.weight)))
        logits = head.logits(hidden[first])
        dropped[first] = _mass_beyond(logits, usable, logits[:, :usable].logsumexp(-1))
    return dropped


def _mass_beyond(logits: Tensor, usable: int, normaliser: Tensor) -> Tensor:
    """Share of the ids from `usable` on, `(n,)`, beside ids whose `logsumexp` is `normaliser` `(n,)`."""
    return torch.sigmoid(logits[:, usable:].logsumexp(-1) - normaliser)


def refuse_dropped(dropped: Tensor, most: float, model: str) -> None:
    """`ValueError` when a token of `dropped` `(n,)` lost more than `most`."""
    worst = float(dropped.max()) if len(dropped) else 0.0
    if worst > most:
        raise ValueError(
            f"endpoint model {model!r}: got {worst:.3g} of a token's probability on ids that the student lacks; expected at most "
            f"{most:g}. Take a student with the teacher's vocabulary, or raise the endpoint's max_dropped_mass to renormalise."
        )


def piece_tokens(device: torch.device, predicted: int) -> int:
    """Tokens whose logits exist at one time."""
    room = LOGITS_AT_ONCE if device.type == "cpu" else 64 * LOGITS_AT_ONCE
    return max(64, room // predicted)


def _piece(
    hidden: Tensor, head: OutputHead, labels: Tensor, keys: Tensor, request: Request, usable: int, wanted: Tensor | None
) -> dict[str, Tensor]:
    whole = head.logits(hidden)
    logits = whole[:, :usable]
    normaliser = logits.logsumexp(-1, keepdim=True)
    lost = _mass_beyond(whole, usable, normaliser[:, 0])
    own = (logits.gather(-1, labels.clamp_max(usable - 1)[:, None]) - normaliser)[:, 0]
    found = {"logprob": torch.where(labels < usable, own, -torch.inf), "dropped": lost}
    if request.kind == "topk":
        best, ids = largest(logits, request.top_k)
        found |= {"ids": ids.int(), "logprobs": best - normaliser}
    elif request.kind == "dense":
        found |= {"dense": logits - normaliser}
    elif request.kind == "sampled":
        found |= draw(logits - normaliser, keys, request)
    elif request.kind == "among":
        assert wanted is not None, "the bundle names the ids"
        found |= {"among": (logits.index_select(-1, wanted[wanted < usable]) - normaliser).logsumexp(-1).clamp_max(0.0)}
    return found


def draw(logprobs: Tensor, keys: Tensor, request: Request) -> dict[str, Tensor]:
    """`draws` ids with replacement from r ~ p^exponent, `(n, draws)`, their log p, and the weights p / (draws r)."""
    proposal = (logprobs * request.exponent).log_softmax(-1)
    ladder = proposal.double().exp().cumsum(-1)
    uniform = uniforms(keys.cpu().numpy(), request.draws)
    heights = torch.from_numpy(uniform).to(ladder.device) * ladder[:, -1:]
    ids = torch.searchsorted(ladder, heights, right=True).clamp_max(logprobs.shape[-1] - 1)
    log_p = logprobs.gather(-1, ids)
    return {"ids": ids.int(), "logprobs": log_p, "weights": (log_p - proposal.gather(-1, ids)).exp() / request.draws}


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `(n, V)`, falling, and their places, both `(n, k)`.

    On a CPU torch partitions only when k is small against V; elsewhere numpy's partition takes half its time.
    """
    if values.device.type != "cpu" or k * TOPK_SHARE <= values.shape[-1]:
        return torch.topk(values, k)
    kept = values.shape[-1] - k
    places = torch.from_numpy(np.argpartition(values.numpy(), min(kept, values.shape[-1] - 1), axis=-1)[:, kept:])
    found, order = values.gather(-1, places).sort(-1, descending=True)
    return found, places.gather(-1, order)


def token_keys(columns: dict[str, NDArray[Any]], loss_at: NDArray[np.int64], seed: int = 0) -> NDArray[np.int64]:
    """`(N,)` seeds of the loss tokens at `loss_at`, made from the row's id, the step it is read in and the place in the row:
    the same whoever shares its bundle."""
    ends = np.cumsum(columns["lengths"].astype(np.int64))
    row = np.searchsorted(ends, loss_at, side="right")
    rows = columns.get("row_id", np.arange(len(ends))).astype(np.uint64)[row]
    step = np.uint64(int(columns["step"][0]) if "step" in columns else 0)
    place = (loss_at - (ends - columns["lengths"])[row]).astype(np.uint64)
    return _mix(_mix(_mix(rows + np.uint64(seed) * _GOLDEN) ^ step) ^ place).view(np.int64)


def mixed_keys(seed: int, *parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`(N,)` seeds made from `seed` and equally long `parts`."""
    keys = np.full(len(parts[0]), seed, dtype=np.uint64)
    for part in parts:
        keys = _mix(keys) ^ part.astype(np.uint64)
    return _mix(keys).view(np.int64)


def uniforms(keys: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`(N, count)` numbers in [0, 1): a pure function of the keys."""
    with np.errstate(over="ignore"):
        words = _mix(keys.view(np.uint64)[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64, after one step of its counter."""
    with np.errstate(over="ignore"):
        v = words + _GOLDEN
        v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(v ^ (v >> np.uint64(31)))
