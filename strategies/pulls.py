"""How hard each term pulls: its own gradient on the states that it is computed from, for a few tokens.

A term on logits is computed from the states that the output head reads, one on inner states from its taps. What is measured is
a token's gradient times the size of its states, so that places of other widths and scales, before and after a norm, compare.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from strategies.core import Progress, Term
from strategies.head import Head, Piece, TokenBatch, term_sum
from strategies.taps import Tapped

PROBED_TOKENS = 32
"""Tokens of a micro-batch on which each term's own gradient is measured."""


def logits_pulls(
    hidden: Tensor,
    head: Head,
    batch: TokenBatch,
    terms: tuple[Term, ...],
    scales: Mapping[str, float],
    progress: Progress,
    settled: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Squared pull of each scaled term on the first `PROBED_TOKENS` of `hidden` `(N, D)`, a scalar by term.

    A few tokens are enough to see which term moves the student, and keep the price of asking small. Objectives of two passes bring
    the numbers `(N, M)` that they `settled` on for all tokens. Zero without tokens.
    """
    probed = min(len(hidden), PROBED_TOKENS)
    if not probed:
        return {t.name: hidden.new_zeros((), dtype=torch.float32) for t in terms}
    states, few, cast = hidden[:probed].detach(), batch.first(probed, terms), head.cast(hidden.dtype)
    raw = cast.block(states)
    found = {}
    for term in terms:
        logits = raw.float().requires_grad_()
        piece = Piece(0, probed, logits, few.signals)
        total = scales[term.name] * term_sum(term, head.outputs(logits, few.labels), piece, few, settled, progress)
        (gradient,) = torch.autograd.grad(total, logits, allow_unused=True, materialize_grads=True)
        found[term.name] = _squared(gradient.to(cast.weight.dtype) @ cast.weight.detach(), states)
    return found


def states_pull(scaled: Tensor, student: Tapped) -> Tensor:
    """The same of one term on inner states whose `scaled` sum was computed from `student`; keeps its graph.

    Nothing behind the taps is asked for a gradient, so hand over taps of the term's own (`Tapped.apart`), or hooks of sharded
    layers fire.
    """
    taps = list(student.outputs)
    if not scaled.requires_grad:
        return torch.zeros_like(scaled)
    gradients = torch.autograd.grad(
        scaled, [student.outputs[t] for t in taps], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    few = student.index[:PROBED_TOKENS]
    parts = [_squared(g.flatten(0, 1)[few], student.outputs[t].detach().flatten(0, 1)[few]) for g, t in zip(gradients, taps, strict=True)]
    return torch.stack(parts).sum()


def _squared(gradient: Tensor, states: Tensor) -> Tensor:
    """Sum over n tokens of the squared size of gradient times that of states, each `(n, W)`; a float32 scalar."""
    return (gradient.float().square().sum(-1) * states.float().square().sum(-1)).sum()
