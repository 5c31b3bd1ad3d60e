"""How hard each term pulls, against autograd on whole logits."""

from __future__ import annotations

from typing import Any

import torch

from strategies.head import Head, TokenLogits
from strategies.pulls import PROBED_TOKENS, term_pulls
from tests.strategies.test_head import NOW, SCALES, TERMS, batch_of, leaves, make_case


def test_each_terms_own_gradient_is_measured_on_a_few_tokens() -> None:
    case = make_case(tokens=40)
    on = leaves(case)
    got = term_pulls(on.hidden, Head(on.weight, on.bias), batch_of(case), TERMS, SCALES, NOW)
    assert got.keys() == {"kd", "ce"}
    few = batch_of(case).first(PROBED_TOKENS, TERMS)
    for term in TERMS:
        logits = (on.hidden[:PROBED_TOKENS] @ on.weight.T + on.bias).detach().requires_grad_()
        objective: Any = term.objective
        signal = None if term.signal is None else few.signals[term.signal]
        total = SCALES[term.name] * objective(TokenLogits(logits, few.labels), signal, few.weights[term.name], NOW)
        (gradient,) = torch.autograd.grad(total, logits)
        torch.testing.assert_close(got[term.name], gradient.square().sum(), rtol=1e-4, atol=0)


def test_nobody_is_measured_without_gradients_or_beside_nobody() -> None:
    case = make_case()
    on = leaves(case)
    head, batch = Head(on.weight, on.bias), batch_of(case)
    with torch.no_grad():
        assert not term_pulls(on.hidden, head, batch, TERMS, SCALES, NOW)
    assert not term_pulls(on.hidden, head, batch, TERMS[:1], SCALES, NOW)
    assert not term_pulls(on.hidden[:0], head, batch, TERMS, SCALES, NOW)
