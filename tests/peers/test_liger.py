"""Against Liger's chunked losses on the same inputs: equal where they are the same, and each difference pinned with its reason.

Skipped without Liger: `pip install -e .[bench]`, or `pip install --no-deps --target FOLDER liger-kernel` and `PYTHONPATH=FOLDER`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.core import Objective, Progress, Term
from strategies.head import Head, TokenBatch, chunked_terms
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.mixtures import JSD
from strategies.objectives.preference import DPO, SimPO, pair_weights
from strategies.schedule import constant
from strategies.signals import Hidden, PerToken, Signal

SEEDS = range(3)
TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 12, 29, 6, 9
SHARES = [0.0, 0.1, 0.5, 0.9, 1.0]

pytest.importorskip("liger_kernel", reason="Liger is not installed")
pytest.importorskip("liger_kernel.chunked_loss", reason="Liger's chunked losses do not import here")


class Case:
    """Hidden states and heads of both models, and labels."""

    def __init__(self, seed: int, tokens: int = TOKENS):
        torch.manual_seed(seed)
        self.hidden, self.weight = torch.randn(tokens, WIDTH), torch.randn(VOCABULARY, WIDTH)
        self.teacher_hidden = torch.randn(tokens, TEACHER_WIDTH)
        self.teacher_weight = torch.randn(VOCABULARY, TEACHER_WIDTH) * 0.7
        self.labels = torch.randint(VOCABULARY, (tokens,))

    @property
    def signal(self) -> Hidden:
        return Hidden(self.teacher_hidden, Head(self.teacher_weight))


Found = tuple[float, Tensor, Tensor]
"""Loss, and its gradients of hidden states and weight."""


def ours(
    case: Case, signal: Signal | None, scales: dict[str, float], weights: Tensor | None, rows: Tensor | None, *terms: Objective
) -> Found:
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    named = dict(zip(scales, terms, strict=True))
    batch = TokenBatch(
        case.labels, {} if signal is None else {"teacher": signal}, {} if weights is None else dict.fromkeys(named, weights), rows
    )
    given = tuple(Term(n, o, constant(1.0), None if o.reads == "nothing" else "teacher") for n, o in named.items())
    loss = chunked_terms(hidden, Head(weight), batch, given, scales, Progress(0, 1), 5).loss
    return gradients(loss, hidden, weight)


def theirs(case: Case, loss: Callable[[Tensor, Tensor], Tensor]) -> Found:
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    return gradients(loss(hidden, weight), hidden, weight)


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> Found:
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.item(), hidden.grad, weight.grad


def same(got: Found, want: Found) -> None:
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=1e-6)
    for mine, peer in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-4, atol=1e-5)


def liger(case: Case, beta: float, hard: float = 0.0, temperature: float = 1.0, labels: Tensor | None = None) -> Found:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    given = case.labels if labels is None else labels
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False, chunk_size=5
    )
    return theirs(case, lambda hidden, weight: loss(hidden, weight, case.teacher_hidden, case.teacher_weight, given))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", SHARES)
def test_generalised_jsd_of_hidden_states_is_ligers(beta: float, seed: int) -> None:
    case = Case(seed)
    same(ours(case, case.signal, {"jsd": 1 / TOKENS}, None, None, JSD(beta=beta, rescale=False)), liger(case, beta))


def test_with_cross_entropy_in_one_pass_it_is_ligers_hard_and_soft_loss() -> None:
    case = Case(5)
    scales = {"jsd": 1 / TOKENS, "ce": 0.3 / TOKENS}
    same(ours(case, case.signal, scales, None, None, JSD(beta=0.5, rescale=False), CrossEntropy()), liger(case, 0.5, hard=0.3))


def test_ignored_tokens_are_left_out_by_both() -> None:
    case = Case(6)
    kept = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0])
    found = ours(case, case.signal, {"jsd": 1 / kept.sum().item()}, kept, None, JSD(beta=0.5, rescale=False))
    same(found, liger(case, 0.5, labels=case.labels.where(kept > 0, -100)))


def test_at_a_temperature_it_does_not_keep_the_gradients_size() -> None:
    """Liger divides logits by T and stops there; T^2 is our default."""
    case, scales = Case(7), {"jsd": 1 / TOKENS}
    peer = liger(case, 0.5, temperature=2.0)
    same(ours(case, case.signal, scales, None, None, JSD(beta=0.5, rescale=False, temperature=2.0, t_scale="none")), peer)
    found = ours(case, case.signal, scales, None, None, JSD(beta=0.5, rescale=False, temperature=2.0))
    same(found, (4 * peer[0], 4 * peer[1], 4 * peer[2]))


def test_a_padded_teacher_vocabulary_gives_its_fake_tokens_real_mass() -> None:
    """Liger pads the student's logits with 0, so a student that is the teacher is taught a difference from it. Ours takes
    the teacher's mass on ids that the student lacks away, and renormalises."""
    case = Case(8)
    ones, fake = torch.ones(TOKENS, 1), torch.zeros(16, WIDTH)
    case.teacher_hidden = torch.cat([case.hidden, ones], -1)  # the teacher is the student, and has ids that it never says
    case.teacher_weight = torch.cat([torch.nn.functional.pad(case.weight, (0, 1)), torch.nn.functional.pad(fake, (0, 1), value=-30.0)])
    assert liger(case, 0.5)[0] > 0.02
    found = ours(case, case.signal, {"jsd": 1 / TOKENS}, None, None, JSD(beta=0.5, rescale=False))
    assert abs(found[0]) < 1e-6 and found[1].abs().max() < 1e-6


def test_in_bfloat16_it_loses_digits_that_ours_keeps() -> None:
    """Liger takes log-softmax and sums in the dtype of the hidden states; ours in float32 after the product."""
    case = Case(9, tokens=64)
    exact = ours(case, case.signal, {"jsd": 1 / 64}, None, None, JSD(beta=0.5, rescale=False))[0]
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(case, name, getattr(case, name).bfloat16())
    found = ours(case, case.signal, {"jsd": 1 / 64}, None, None, JSD(beta=0.5, rescale=False))[0]
    peer = liger(case, 0.5)[0]
    assert abs(found - exact) < 5e-3 * exact
    assert abs(peer - exact) > 2 * abs(found - exact)


LENGTHS = np.asarray([3, 3, 2, 2, 1, 1])


def pairs(case: Case) -> tuple[Tensor, Tensor]:
    """Our weights and rows, for tokens in the order chosen, rejected, chosen, ..."""
    return torch.from_numpy(pair_weights(LENGTHS)), torch.from_numpy(np.repeat(np.arange(6), LENGTHS))


def padded(case: Case, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's form of the same: all chosen texts, then all rejected ones, `(6, 3, D)`, and labels with -100."""
    order = [0, 2, 4, 1, 3, 5]
    parts, labels = hidden.split(LENGTHS.tolist()), case.labels.split(LENGTHS.tolist())
    states = torch.stack([torch.nn.functional.pad(parts[i], (0, 0, 0, 3 - len(parts[i]))) for i in order])
    return states, torch.stack([torch.nn.functional.pad(labels[i], (0, 3 - len(labels[i])), value=-100) for i in order])


def test_simpo_is_ligers() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    case = Case(10)
    loss = LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.5, compute_nll_loss=False, compiled=False)

    def peer(hidden: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = loss(weight, *padded(case, hidden))[0]
        return found

    weights, rows = pairs(case)
    same(ours(case, None, {"simpo": 1 / 3}, weights, rows, SimPO(beta=2.0, gamma=0.5)), theirs(case, peer))


@pytest.mark.parametrize("averaged", [False, True])
def test_dpo_is_ligers(averaged: bool) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    case = Case(11)
    loss = LigerFusedLinearDPOLoss(beta=0.4, compiled=False, average_log_prob=averaged)

    def peer(hidden: Tensor, weight: Tensor) -> Tensor:
        states, labels = padded(case, hidden)
        reference, _ = padded(case, case.teacher_hidden)
        found: Tensor = loss(weight, states, labels, None, reference, case.teacher_weight)[0]
        return found

    log_p = (case.teacher_hidden @ case.teacher_weight.T).log_softmax(-1).gather(-1, case.labels[:, None])[:, 0]
    weights, rows = pairs(case)
    found = ours(case, PerToken(log_p), {"dpo": 1 / 3}, weights, rows, DPO(beta=0.4, length_normalised=averaged))
    same(found, theirs(case, peer))
