"""What objectives of single tokens and of whole sequences share: the given token on either side, and exact surrogates."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.head import TokenLogits
from strategies.signals import Signal


def student_label_logprobs(outputs: TokenLogits, temperature: float = 1.0) -> Tensor:
    """`log q_T(label)`, `(N,)` float32, with gradient."""
    return outputs.partition(outputs.labels[:, None], temperature, want_tail=False)[0][:, 0]


def teacher_label_logprobs(signal: Signal | None, outputs: TokenLogits, reader: str) -> Tensor:
    """`log p(label)` that the signal carries or can tell, `(N,)` float32.

    `label_logprobs` of a signal is the tensor itself, or a method of the outputs. `ValueError` when there is neither;
    `reader` names who asked.
    """
    given = getattr(signal, "label_logprobs", None)
    found = given(outputs) if callable(given) and not isinstance(given, Tensor) else given
    if not isinstance(found, Tensor):
        got = "no signal" if signal is None else type(signal).__name__
        raise ValueError(f"{reader} reads log-probabilities of the given tokens (`label_logprobs`), and got {got}")
    return found.detach().float()


def advantage(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`d = log p - log q` of given tokens, `(N,)`, without gradient; 0 where both are impossible."""
    log_p, log_q = log_p.detach(), log_q.detach()
    return torch.where(log_p == log_q, 0.0, log_p - log_q)


def surrogate(values: Tensor, slopes: Tensor, logprobs: Tensor) -> Tensor:
    """The scalar whose value is the sum of `values` and whose gradient is that of the sum of `slopes * logprobs`.

    All `(N,)`; `values` and `slopes` carry no gradient. A token of slope 0 is left out, so that -inf beside it does no harm.
    """
    through = (slopes.detach() * torch.where(slopes != 0, logprobs, 0.0)).sum()
    return values.detach().sum() + through - through.detach()


def token_rows(rows: Tensor | None, tokens: int, device: torch.device, reader: str) -> Tensor:
    """Row numbers `(N,)` int64 of a micro-batch; `ValueError` when it has tokens and does not say whose they are."""
    if rows is not None:
        return rows
    if tokens:
        raise ValueError(f"{reader} reads whole sequences, and the micro-batch does not say which row each of its {tokens} tokens is of")
    return torch.zeros(0, dtype=torch.int64, device=device)
