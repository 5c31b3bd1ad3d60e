"""The chunked output head: hidden states in, loss sums and gradients out, chunk of tokens by chunk of tokens.

A full `(N, V)` float32 tensor never exists. Terms share one pass over each chunk's logits, and the gradient is made in
the forward pass, so scales must be known before it (design rule 4). Must be called inside the wrapped module's
forward, where sharded parameters are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from strategies.core import Progress, Term, TwoPass
from strategies.signals import Signal

CHUNK_TOKENS = 256
PROBED_TOKENS = 32
"""Tokens of a micro-batch on which each term's own gradient is measured."""


class TokenLogits:
    """Student logits of one chunk, `(N, V)` float32, with what several terms want of them computed once."""

    def __init__(self, logits: Tensor, labels: Tensor):
        self.logits = logits
        self.labels = labels
        self._normaliser: dict[float, Tensor] = {}

    def normaliser(self, temperature: float = 1.0) -> Tensor:
        """`logsumexp(z / T)`, `(N, 1)`."""
        if temperature not in self._normaliser:
            self._normaliser[temperature] = torch.logsumexp(self._tempered(temperature), -1, keepdim=True)
        return self._normaliser[temperature]

    def logprobs(self, temperature: float = 1.0) -> Tensor:
        """`log softmax(z / T)`, `(N, V)`."""
        return self._tempered(temperature) - self.normaliser(temperature)

    def label_logprobs(self) -> Tensor:
        """`log q(label)` at temperature 1, `(N,)`."""
        return (self.logits.gather(-1, self.labels[:, None]) - self.normaliser())[:, 0]

    def partition(self, ids: Tensor, temperature: float, want_tail: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of `ids`, `(N, K)`, and of everything else together, `(N, 1)`.

        The tail is summed from its own logits: `1 - sum` would cancel once the student agrees with the teacher.
        """
        tempered = self._tempered(temperature)
        inside = tempered.gather(-1, ids)
        if not want_tail:
            return inside - self.normaliser(temperature), None
        outside = torch.logsumexp(tempered.scatter(-1, ids, -torch.inf), -1, keepdim=True)
        if temperature not in self._normaliser:
            self._normaliser[temperature] = torch.logaddexp(outside, torch.logsumexp(inside, -1, keepdim=True))
        normaliser = self._normaliser[temperature]
        return inside - normaliser, outside - normaliser

    def _tempered(self, temperature: float) -> Tensor:
        return self.logits if temperature == 1.0 else self.logits / temperature


@dataclass(frozen=True)
class TokenBatch:
    """What the terms of one micro-batch read, all for its N loss tokens in order."""

    labels: Tensor
    """`(N,)` int64."""
    signals: Mapping[str, Signal]
    weights: Mapping[str, Tensor]
    """`(N,)` float32 by term name; a term without an entry weighs every token 1."""
    rows: Tensor | None = None
    """`(N,)` int64, the number of each token's row in the micro-batch; only objectives of whole sequences read it."""

    def signal(self, term: Term, start: int, stop: int) -> Signal | None:
        """The signal of `term` for tokens `start:stop`."""
        return None if term.signal is None else self.signals[term.signal].chunk(start, stop)

    def first(self, tokens: int, terms: Iterable[Term]) -> TokenBatch:
        """The same for the first `tokens` tokens, with the signals that `terms` read."""
        read = {t.signal: s for t in terms if t.signal is not None and (s := self.signal(t, 0, tokens)) is not None}
        weights = {name: values[:tokens] for name, values in self.weights.items()}
        return TokenBatch(self.labels[:tokens], read, weights, None if self.rows is None else self.rows[:tokens])

    def weight(self, term: str, start: int, stop: int) -> Tensor:
        """`(stop - start,)` weights of the term called `term`."""
        given = self.weights.get(term)
        if given is not None:
            return given[start:stop]
        return torch.ones(stop - start, device=self.labels.device)


@dataclass(frozen=True)
class TermSums:
    """Result of one micro-batch: `loss` carries the gradient, already scaled; `sums` are detached and unscaled."""

    loss: Tensor
    sums: Mapping[str, Tensor]
    pulls: Mapping[str, Tensor] = field(default_factory=dict)
    """Squared norm of each scaled term's own gradient on the logits of `PROBED_TOKENS` tokens, for terms on logits."""


@dataclass(frozen=True)
class Head:
    """A model's output head: `transform(hidden @ weight.T + bias)`."""

    weight: Tensor
    """`(V, D)`; may be tied to the input embedding."""
    bias: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    """Element-wise function of raw logits, such as soft-capping."""

    def raw(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype), None if self.bias is None else self.bias.to(hidden.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """`(N, V)` float32 logits of `(N, D)` hidden states."""
        raw = self.raw(hidden).float()
        return raw if self.transform is None else self.transform(raw)

    def outputs(self, raw: Tensor, labels: Tensor) -> TokenLogits:
        """What objectives see of `raw` logits `(n, V)` float32 and labels `(n,)`."""
        return TokenLogits(raw if self.transform is None else self.transform(raw), labels)

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head with parameters in `dtype`."""
        return Head(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype), self.transform)


def chunked_terms(
    hidden: Tensor,
    head: Head,
    batch: TokenBatch,
    terms: tuple[Term, ...],
    scales: Mapping[str, float],
    progress: Progress,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TermSums:
    """Sums of `terms` over the N tokens whose hidden states `(N, D)` are given.

    `scales[term]` multiplies a term's sum in the loss (weight, world size and denominator together). The gradient with
    respect to hidden states and to a trainable head is made here and handed out in backward.
    """

    settled = _first_pass(hidden, head, batch, terms, progress, chunk_tokens)

    def scaled_sum(logits: Tensor, start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        outputs = head.outputs(logits, batch.labels[start:stop])
        sums = [_term_sum(term, outputs, batch, start, stop, settled, progress) for term in terms]
        total = torch.stack([scales[t.name] * s for t, s in zip(terms, sums, strict=True)]).sum()
        return total, [s.detach() for s in sums]

    loss, sums = _ChunkedHead.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, scaled_sum, len(terms), chunk_tokens
    )
    pulls = term_pulls(hidden, head, batch, terms, scales, progress)
    return TermSums(loss=loss, sums={t.name: sums[i] for i, t in enumerate(terms)}, pulls=pulls)


def _term_sum(
    term: Term, outputs: TokenLogits, batch: TokenBatch, start: int, stop: int, settled: Mapping[str, Tensor], progress: Progress
) -> Tensor:
    """The unscaled sum of a term over tokens `start:stop`."""
    objective, signal, weights = term.objective, batch.signal(term, start, stop), batch.weight(term.name, start, stop)
    if isinstance(objective, TwoPass):
        return objective.settled(outputs, signal, weights, progress, settled[term.name][start:stop])
    return objective(outputs, signal, weights, progress)


def term_pulls(
    hidden: Tensor, head: Head, batch: TokenBatch, terms: tuple[Term, ...], scales: Mapping[str, float], progress: Progress
) -> dict[str, Tensor]:
    """Squared norm of each scaled term's own gradient on the logits of the first `PROBED_TOKENS` tokens, a scalar by term.

    One chunk is enough to see which term moves the student, and keeps the price of asking small. Objectives of two passes
    settle on those tokens alone. None without gradients, without tokens, and for a single term, which moves it alone.
    """
    probed = min(len(hidden), PROBED_TOKENS)
    if not (torch.is_grad_enabled() and hidden.requires_grad and probed and len(terms) > 1):
        return {}
    states = hidden[:probed].detach()
    few = batch.first(probed, terms)
    settled = _first_pass(states, head, few, terms, progress, probed)
    found = {}
    for term in terms:
        logits = head.cast(states.dtype).raw(states).detach().float().requires_grad_()
        total = scales[term.name] * _term_sum(term, head.outputs(logits, few.labels), few, 0, probed, settled, progress)
        (gradient,) = torch.autograd.grad(total, logits, allow_unused=True, materialize_grads=True)
        found[term.name] = gradient.square().sum()
    return found


@torch.no_grad()
def _first_pass(
    hidden: Tensor, head: Head, batch: TokenBatch, terms: tuple[Term, ...], progress: Progress, chunk_tokens: int
) -> dict[str, Tensor]:
    """What each objective of two passes settles from all tokens, `(N, M)` by term; no pass when there is none."""
    pending = [(t, t.objective) for t in terms if isinstance(t.objective, TwoPass)]
    if not pending or not len(hidden):  # nothing of an empty micro-batch is read again
        return {}
    cast, surveys = head.cast(hidden.dtype), {t.name: list[Tensor]() for t, _ in pending}
    for start in range(0, len(hidden), chunk_tokens) or [0]:
        stop = min(start + chunk_tokens, len(hidden))
        outputs = cast.outputs(cast.raw(hidden[start:stop]).float(), batch.labels[start:stop])
        for term, objective in pending:
            surveys[term.name].append(objective.survey(outputs, batch.signal(term, start, stop), progress))
    count = len(hidden)
    return {t.name: o.settle(torch.cat(surveys[t.name]), batch, batch.weight(t.name, 0, count), progress) for t, o in pending}


class _ChunkedHead(torch.autograd.Function):
    """Runs `scaled_sum` chunk by chunk and keeps only the gradients of its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        scaled_sum: Callable[[Tensor, int, int], tuple[Tensor, list[Tensor]]],
        terms: int,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if want_weight else None
        grad_bias = torch.zeros(len(bias), device=weight.device) if bias is not None and want_bias else None
        cast = Head(weight, bias).cast(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        sums = torch.zeros(terms, device=hidden.device)
        for start in range(0, len(hidden), chunk_tokens):
            stop = min(start + chunk_tokens, len(hidden))
            piece = hidden[start:stop]
            with torch.enable_grad():
                logits = cast.raw(piece).detach().float().requires_grad_()
                total, parts = scaled_sum(logits, start, stop)
            loss += total.detach()
            sums += torch.stack(parts)
            if not (want_hidden or want_weight or want_bias):
                continue
            (grad_logits,) = torch.autograd.grad(total, logits, materialize_grads=True)
            grad_out = grad_logits.to(piece.dtype)
            if grad_hidden is not None:
                grad_hidden[start:stop] = grad_out @ cast.weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_out, piece)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        by = grad_outputs[0]
        hidden, weight, bias = ctx.grads
        ctx.grads = None
        return (
            None if hidden is None else hidden * by.to(hidden.dtype),
            None if weight is None else (weight.mul_(by)).to(ctx.dtypes[0]),
            None if bias is None else (bias * by).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


def _add_product(into: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """`into += grad_logits.T @ hidden`, accumulated in float32 whatever the compute dtype."""
    if hidden.dtype == torch.float32:
        into.addmm_(grad_logits.T, hidden)
    else:
        into += (grad_logits.T @ hidden).float()
