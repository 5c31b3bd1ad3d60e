"""How hard each term pulls, against autograd on whole logits and on the states themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strategies.core import Term
from strategies.head import Head, TokenBatch, TokenLogits, chunked_terms
from strategies.objectives.preference import SimPO, pair_weights
from strategies.pulls import PROBED_TOKENS, logits_pulls, states_pull
from strategies.schedule import constant
from strategies.taps import OUTPUT, Tapped
from tests.strategies.test_head import NOW, SCALES, TERMS, batch_of, leaves, make_case


def test_each_terms_own_gradient_is_measured_on_a_few_tokens() -> None:
    case = make_case(tokens=40)
    on = leaves(case)
    got = logits_pulls(on.hidden, Head(on.weight, on.bias), batch_of(case), TERMS, SCALES, NOW, {})
    assert got.keys() == {"kd", "ce"}
    few = batch_of(case).first(PROBED_TOKENS, TERMS)
    for term in TERMS:
        states = on.hidden[:PROBED_TOKENS].detach().requires_grad_()
        objective: Any = term.objective
        signal = None if term.signal is None else few.signals[term.signal]
        outputs = TokenLogits(states @ on.weight.T + on.bias, few.labels)
        total = SCALES[term.name] * objective(outputs, signal, few.weights[term.name], NOW)
        (gradient,) = torch.autograd.grad(total, states)
        torch.testing.assert_close(got[term.name], (gradient.norm(dim=-1) * states.norm(dim=-1)).square().sum(), rtol=1e-4, atol=0)


def test_a_few_tokens_of_a_sequence_pull_as_they_do_in_the_whole() -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(80, 6, requires_grad=True), Head(torch.randn(11, 6))
    lengths = np.asarray([20, 20, 15, 25])
    rows, weights = torch.arange(4).repeat_interleave(torch.from_numpy(lengths)), torch.from_numpy(pair_weights(lengths))
    batch = TokenBatch(torch.randint(0, 11, (80,)), {}, {"pairs": weights}, rows)
    terms = (Term("pairs", SimPO(), constant(1.0)),)
    whole = chunked_terms(hidden, head, batch, terms, {"pairs": 0.5}, NOW)
    (gradient,) = torch.autograd.grad(whole.loss, hidden)
    got = logits_pulls(hidden, head, batch, terms, {"pairs": 0.5}, NOW, whole.settled)["pairs"]
    want = (gradient.norm(dim=-1) * hidden.detach().norm(dim=-1)).square()[:PROBED_TOKENS].sum()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_nobody_is_measured_without_tokens() -> None:
    case = make_case()
    on = leaves(case)
    found = logits_pulls(on.hidden[:0], Head(on.weight, on.bias), batch_of(case), TERMS, SCALES, NOW, {})
    assert found.keys() == {"kd", "ce"} and not any(found.values())


@dataclass(frozen=True)
class States:
    """Three places of two sequences, and what is computed from them by way of `scale`."""

    tapped: Tapped
    source: Tensor


def states(scale: float = 1.0) -> States:
    torch.manual_seed(0)
    source = torch.randn(2, 3, 5).mul(scale).requires_grad_()
    tapped = Tapped({OUTPUT: source}, torch.tensor([0, 2, 4]), torch.tensor([[0] * 3, [1] * 3]))
    return States(tapped.apart(), source)


def cosine(tapped: Tapped) -> Tensor:
    return torch.nn.functional.cosine_similarity(tapped.tokens(OUTPUT), torch.ones(3, 5)).sum()


def test_a_term_on_states_is_measured_where_it_reads_them() -> None:
    on = states()
    wanted = states()
    (gradient,) = torch.autograd.grad(0.3 * cosine(wanted.tapped), wanted.source)
    at = [0, 2, 4]
    sizes = gradient.flatten(0, 1)[at].norm(dim=-1) * wanted.source.flatten(0, 1)[at].norm(dim=-1)
    torch.testing.assert_close(states_pull(0.3 * cosine(on.tapped), on.tapped), sizes.square().sum())


def test_the_scale_of_the_states_does_not_change_the_pull() -> None:
    small, large = states(), states(1000.0)
    pulls = [states_pull(cosine(on.tapped), on.tapped) for on in (small, large)]
    torch.testing.assert_close(*pulls)


def test_measuring_touches_nothing_behind_the_taps() -> None:
    on = states()
    fired: list[Tensor] = []
    on.source.register_hook(fired.append)  # such as FSDP2's, which gathers parameters
    total = cosine(on.tapped)
    states_pull(total, on.tapped)
    assert not fired and on.source.grad is None
    total.backward()
    assert len(fired) == 1 and on.source.grad is not None


def test_a_term_that_does_not_move_the_student_does_not_pull() -> None:
    on = states()
    assert states_pull(torch.zeros(()), on.tapped) == 0
    assert states_pull(torch.ones((), requires_grad=True) * 2, on.tapped) == 0
