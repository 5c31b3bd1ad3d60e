"""The chunked output head: hidden states in, loss sums and gradients out, a few tokens at a time.

A full `(N, V)` float32 tensor never exists. Matrix products take a *block* of tokens, whose logits stand in one piece of
memory that every block uses again; objectives see a *piece* of it at a time, and the gradient takes the place of the
logits. Terms share one pass over each piece, and the gradient is made in the forward pass, so scales must be known before
it (design rule 4). Must be called inside the wrapped module's forward, where sharded parameters are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from strategies.core import Progress, Term, TwoPass
from strategies.cut import Costly, Cut, cut_for
from strategies.outputs import RecordedLogits, TokenLogits
from strategies.products import add_product, times, times_transposed
from strategies.signals import Signal

__all__ = ["Head", "Piece", "TermSums", "TokenBatch", "TokenLogits", "chunked_terms"]


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

    def first(self, tokens: int, terms: Iterable[Term]) -> TokenBatch:
        """The same for the first `tokens` tokens, with the signals that `terms` read."""
        read = {t.signal: self.signals[t.signal].chunk(0, tokens) for t in terms if t.signal is not None}
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
    """Squared pull of each scaled term on a few tokens (`strategies.pulls`), where measured."""
    settled: Mapping[str, Tensor] = field(default_factory=dict)
    """`(N, M)` numbers that objectives of two passes settled on, by term."""


@dataclass(frozen=True)
class Head:
    """A model's output head: `transform(hidden @ weight.T + bias)`."""

    weight: Tensor
    """`(V, D)`; may be tied to the input embedding."""
    bias: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    """Element-wise function of raw logits, such as soft-capping."""

    def raw(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """`(N, V)` in the dtype of `hidden` `(N, D)`, before `transform`; into `out` when it is given, then without gradient."""
        head = self.cast(hidden.dtype)
        if out is None:
            return torch.nn.functional.linear(hidden, head.weight, head.bias)
        with torch.no_grad():
            return times_transposed(hidden, head.weight, head.bias, out)

    def block(self, hidden: Tensor) -> Tensor:
        """`raw` without gradient, in new memory."""
        return self.raw(hidden, hidden.new_empty(len(hidden), len(self.weight)))

    def logits(self, hidden: Tensor, raw: Tensor | None = None) -> Tensor:
        """`(N, V)` float32 logits of `(N, D)` hidden states, whose `raw` may have been made before."""
        raw = (self.raw(hidden) if raw is None else raw).float()
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
    chunk_tokens: int | None = None,
    repeatable: bool = False,
) -> TermSums:
    """Sums of `terms` over the N tokens whose hidden states `(N, D)` are given.

    `scales[term]` multiplies a term's sum in the loss (weight, world size and denominator together). The gradient with
    respect to hidden states and to a trainable head is made here and handed out in backward; with gradients disabled,
    none is made. `chunk_tokens` overrides the number of tokens whose logits exist at once. Gradients are handed out once and not kept,
    unless `repeatable`.
    """
    cut = cut_for(len(head.weight), hidden.device.type, (t.objective for t in terms), chunk_tokens)
    settled = first_pass(hidden, head, batch, terms, progress, cut)

    def scaled_sum(outputs: TokenLogits, piece: Piece) -> tuple[Tensor, list[Tensor]]:
        sums = [term_sum(term, outputs, piece, batch, settled, progress) for term in terms]
        total = torch.stack([scales[t.name] * s for t, s in zip(terms, sums, strict=True)]).sum()
        return total, [s.detach() for s in sums]

    run = _Run(head, batch, _signals(terms), scaled_sum, len(terms), cut, torch.is_grad_enabled(), repeatable)
    loss, sums = _ChunkedHead.apply(hidden, head.weight, head.bias, run)  # type: ignore[no-untyped-call]
    return TermSums(loss=loss, sums={t.name: sums[i] for i, t in enumerate(terms)}, settled=settled)


def term_sum(
    term: Term, outputs: TokenLogits, piece: Piece, batch: TokenBatch, settled: Mapping[str, Tensor], progress: Progress
) -> Tensor:
    """The unscaled sum of a term over a piece."""
    objective, weights = term.objective, batch.weight(term.name, piece.start, piece.stop)
    if isinstance(objective, TwoPass):
        return objective.settled(outputs, piece.signal(term), weights, progress, settled[term.name][piece.start : piece.stop])
    return objective(outputs, piece.signal(term), weights, progress)


@dataclass(frozen=True)
class Piece:
    """Tokens `start:stop` of a micro-batch: their raw logits `(n, V)` in the compute dtype, and their signals by name."""

    start: int
    stop: int
    raw: Tensor
    signals: Mapping[str, Signal]

    def signal(self, term: Term) -> Signal | None:
        """The signal that `term` reads; terms that read one signal get the same object."""
        return None if term.signal is None else self.signals[term.signal]


def _signals(terms: Iterable[Term]) -> tuple[str, ...]:
    return tuple({t.signal: None for t in terms if t.signal is not None})


def _pieces(raw: Tensor, start: int, batch: TokenBatch, signals: Iterable[str], tokens: int) -> Iterator[Piece]:
    """The block with logits `raw`, which begins at token `start`, piece by piece; an empty block is one piece."""
    whole = {name: batch.signals[name].chunk(start, start + len(raw)) for name in signals}
    ready = {name: signal.ready() if isinstance(signal, Costly) else signal for name, signal in whole.items()}
    for a in range(0, len(raw), tokens) or [0]:
        b = min(a + tokens, len(raw))
        yield Piece(start + a, start + b, raw[a:b], {name: signal.chunk(a, b) for name, signal in ready.items()})


@torch.no_grad()
def first_pass(hidden: Tensor, head: Head, batch: TokenBatch, terms: tuple[Term, ...], progress: Progress, cut: Cut) -> dict[str, Tensor]:
    """What each objective of two passes settles from all tokens, `(N, M)` by term; no pass when there is none."""
    pending = [(t, t.objective) for t in terms if isinstance(t.objective, TwoPass)]
    if not pending or not len(hidden):  # nothing of an empty micro-batch is read again
        return {}
    cast, surveys = head.cast(hidden.dtype), {t.name: list[Tensor]() for t, _ in pending}
    names = _signals(t for t, _ in pending)
    for start in range(0, len(hidden), cut.block_tokens) or [0]:
        for piece in _pieces(cast.block(hidden[start : start + cut.block_tokens]), start, batch, names, cut.piece_tokens):
            outputs = cast.outputs(piece.raw.float(), batch.labels[piece.start : piece.stop])
            for term, objective in pending:
                surveys[term.name].append(objective.survey(outputs, piece.signal(term), progress))
    count = len(hidden)
    return {t.name: o.settle(torch.cat(surveys[t.name]), batch, batch.weight(t.name, 0, count), progress) for t, o in pending}


@dataclass(frozen=True)
class _Run:
    """What `_ChunkedHead` is given besides tensors with gradients."""

    head: Head
    batch: TokenBatch
    signals: tuple[str, ...]
    scaled_sum: Callable[[TokenLogits, Piece], tuple[Tensor, list[Tensor]]]
    terms: int
    cut: Cut
    with_gradient: bool
    repeatable: bool


class _ChunkedHead(torch.autograd.Function):
    """Runs `scaled_sum` piece by piece and keeps only the gradients of its inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, run: _Run) -> tuple[Tensor, Tensor]:
        grads = _Gradients.of(hidden, weight, bias, tuple(run.with_gradient and needed for needed in ctx.needs_input_grad))
        cast, tokens = Head(weight, bias).cast(hidden.dtype), run.cut.block_tokens
        loss, sums = torch.zeros((), device=hidden.device), torch.zeros(run.terms, device=hidden.device)
        memory = hidden.new_empty(min(tokens, len(hidden)), len(weight))
        for start in range(0, len(hidden), tokens):
            states = hidden[start : start + tokens]
            raw = cast.raw(states, out=memory[: len(states)])
            _block(run, raw, start, grads, loss, sums)
            grads.add(start, raw, states, cast.weight)
        ctx.grads, ctx.repeatable = grads, run.repeatable
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        by, grads = grad_outputs[0], ctx.grads
        if not ctx.repeatable:
            ctx.grads = None
        return (
            None if grads.hidden is None else grads.hidden * by.to(grads.hidden.dtype),
            None if grads.weight is None else (grads.weight * by if ctx.repeatable else grads.weight.mul_(by)).to(ctx.dtypes[0]),
            None if grads.bias is None else (grads.bias * by).to(ctx.dtypes[1]),
            None,
        )


def _block(run: _Run, raw: Tensor, start: int, grads: _Gradients, loss: Tensor, sums: Tensor) -> None:
    """Adds a block's sums to `loss` and `sums`, and puts the gradient of its logits in their place; keeps nothing else."""
    for piece in _pieces(raw, start, run.batch, run.signals, run.cut.piece_tokens):
        total, parts = _piece(run, piece, grads.bias) if grads.wanted else _measured(run, piece)
        loss += total
        sums += torch.stack(parts)


def _measured(run: _Run, piece: Piece) -> tuple[Tensor, list[Tensor]]:
    """The scaled and the unscaled sums of a piece."""
    return run.scaled_sum(run.head.outputs(piece.raw.float(), run.batch.labels[piece.start : piece.stop]), piece)


@torch.enable_grad()
def _piece(run: _Run, piece: Piece, by_bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The same; the gradient of the raw logits takes their place, and is added to `by_bias` before it is rounded."""
    raw, labels = piece.raw.detach().float(), run.batch.labels[piece.start : piece.stop]
    logits = raw if run.head.transform is None else run.head.transform(raw.requires_grad_())
    outputs = RecordedLogits(logits if logits is raw else logits.detach().clone(), labels)
    total, parts = run.scaled_sum(outputs, piece)
    gradient = outputs.gradient(total)
    if logits is not raw:
        (gradient,) = torch.autograd.grad(logits, raw, gradient)
    if by_bias is not None:
        by_bias += gradient.sum(0)
    if gradient.data_ptr() != piece.raw.data_ptr():
        piece.raw.copy_(gradient)
    return total.detach(), parts


@dataclass
class _Gradients:
    """Gradients of hidden states `(N, D)` in their dtype, and of weight `(V, D)` and bias `(V,)` in float32; None if unwanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> _Gradients:
        return cls(
            torch.zeros_like(hidden) if wanted[0] else None,
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted[1] else None,
            torch.zeros(len(bias), dtype=torch.float32, device=weight.device) if bias is not None and wanted[2] else None,
        )

    @property
    def wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, start: int, by_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Tokens from `start` on, with the gradient of their logits `(n, V)` and hidden states `(n, D)` in one dtype."""
        if self.hidden is not None:
            times(by_logits, weight, out=self.hidden[start : start + len(hidden)])
        if self.weight is not None:
            add_product(self.weight, by_logits, hidden)
