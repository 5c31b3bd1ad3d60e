"""How hard each term pulls: its own gradient on the logits of a few tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from strategies.core import Progress, Term
from strategies.cut import Cut
from strategies.head import Head, Piece, TokenBatch, first_pass, term_sum

PROBED_TOKENS = 32
"""Tokens of a micro-batch on which each term's own gradient is measured."""


def term_pulls(
    hidden: Tensor, head: Head, batch: TokenBatch, terms: tuple[Term, ...], scales: Mapping[str, float], progress: Progress
) -> dict[str, Tensor]:
    """Squared norm of each scaled term's own gradient on the logits of the first `PROBED_TOKENS` tokens, a scalar by term.

    A few tokens are enough to see which term moves the student, and keep the price of asking small. Objectives of two passes
    settle on those tokens alone. None without gradients, without tokens, and for a single term, which moves it alone.
    """
    probed = min(len(hidden), PROBED_TOKENS)
    if not (torch.is_grad_enabled() and hidden.requires_grad and probed and len(terms) > 1):
        return {}
    states, few = hidden[:probed].detach(), batch.first(probed, terms)
    settled = first_pass(states, head, few, terms, progress, Cut(probed, probed))
    raw = head.cast(states.dtype).block(states)
    found = {}
    for term in terms:
        logits = raw.float().requires_grad_()
        piece = Piece(0, probed, logits, few.signals)
        total = scales[term.name] * term_sum(term, head.outputs(logits, few.labels), piece, few, settled, progress)
        (gradient,) = torch.autograd.grad(total, logits, allow_unused=True, materialize_grads=True)
        found[term.name] = gradient.square().sum()
    return found
