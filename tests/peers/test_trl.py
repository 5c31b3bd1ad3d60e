"""Against TRL on the same inputs: equal where it defines the same quantity, and each difference pinned with its reason.

Skipped without TRL: `pip install -e .[bench]`, or `pip install --no-deps --target FOLDER trl` and `PYTHONPATH=FOLDER`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.objectives.mixtures import JSD
from strategies.objectives.sampled import ReverseKLPolicyGradient
from strategies.objectives.transport import ULD
from strategies.signals import Dense, PerToken, Tail, TopK
from tests.strategies.chunking import Tokens, run, same

SEEDS = range(3)
TOKENS, VOCABULARY, KEPT = 7, 23, 5
SHARES = [0.0, 0.1, 0.5, 0.9, 1.0]

pytest.importorskip("trl", reason="TRL is not installed")


def logits(seed: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn((TOKENS, vocabulary), generator=torch.Generator().manual_seed(seed)) * 2


def theirs(loss: Any, z_q: Tensor) -> tuple[float, np.ndarray]:
    """Value and logit gradient of a function of student logits `(1, N, V)`."""
    z = z_q[None].clone().requires_grad_()
    value = loss(z)
    value.backward()
    assert z.grad is not None
    return value.item(), z.grad[0].numpy()


def gkd(z_q: Tensor, z_p: Tensor, beta: float, **settings: Any) -> tuple[float, np.ndarray]:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return theirs(lambda z: GKDTrainer.generalized_jsd_loss(z, z_p[None], beta=beta, reduction="sum", **settings), z_q)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", SHARES)
def test_generalised_jsd_is_gkds(beta: float, seed: int) -> None:
    z_q, z_p = logits(seed), logits(seed + 10)
    same(run(JSD(beta=beta, rescale=False), z_q, Tokens(signal=Dense(z_p))), gkd(z_q, z_p, beta))


def test_masked_tokens_are_left_out_by_both() -> None:
    z_q, z_p = logits(0), logits(1)
    labels = torch.tensor([[3, -100, 1, -100, -100, 0, 2]])
    ours = run(JSD(beta=0.5, rescale=False), z_q, Tokens(signal=Dense(z_p), weights=(labels[0] != -100).float()))
    same(ours, gkd(z_q, z_p, 0.5, labels=labels))
    assert not ours[1][1].any()


@pytest.mark.parametrize("temperature", [0.7, 2.0, 5.0])
def test_at_a_temperature_it_does_not_keep_the_gradients_size(temperature: float) -> None:
    """TRL divides logits by T and stops there, so that a sweep over T is one over the learning rate; T^2 is our default."""
    z_q, z_p = logits(3), logits(4)
    peer = gkd(z_q, z_p, 0.5, temperature=temperature)
    same(run(JSD(beta=0.5, rescale=False, temperature=temperature, t_scale="none"), z_q, Tokens(signal=Dense(z_p))), peer)
    ours = run(JSD(beta=0.5, rescale=False, temperature=temperature), z_q, Tokens(signal=Dense(z_p)))
    same(ours, (peer[0] * temperature**2, peer[1] * temperature**2))


def test_its_ends_jump_and_ours_do_not() -> None:
    """GKD's value tends to 0 at the ends, where TRL puts the KLs; ours is divided by beta (1 - beta) unless asked."""
    z_q, z_p = logits(5), logits(6)
    near, end = gkd(z_q, z_p, 1e-4)[0], gkd(z_q, z_p, 0.0)[0]
    assert near < 1e-3 * end
    ours = [run(JSD(beta=beta), z_q, Tokens(signal=Dense(z_p)))[0] for beta in (1e-4, 0.0)]
    assert ours[0] == pytest.approx(ours[1], rel=0.02) and ours[1] == pytest.approx(end, rel=1e-5)


@pytest.mark.parametrize("beta", SHARES)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_top_k_with_a_bucket_or_renormalised_is_self_distillations(tail: Tail, beta: float) -> None:
    """There the student chooses the K; the teacher's log-probabilities of them make the same signal."""
    from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

    z_q, z_p = logits(7), logits(8)
    ids = z_q.topk(KEPT).indices
    signal = TopK(ids, z_p.log_softmax(-1).gather(-1, ids), tail)
    peer = theirs(
        lambda z: compute_topk_self_distillation_loss(
            z, z_p[None], distillation_topk=KEPT, distillation_alpha=beta, distillation_add_tail=tail == "bucket"
        ).sum(),
        z_q,
    )
    same(run(JSD(beta=beta, rescale=False), z_q, Tokens(signal=signal)), peer)


def test_top_k_of_a_server_with_a_bucket_is_the_same_at_temperature_1() -> None:
    z_q, z_p = logits(9), logits(10)
    log_p, ids = z_p.log_softmax(-1).topk(KEPT)
    same(run(JSD(beta=0.0, rescale=False), z_q, Tokens(signal=TopK(ids, log_p, "bucket"))), server(z_q, log_p, ids))


def server(z_q: Tensor, log_p: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[float, np.ndarray]:
    """Forward KL as the server trainer has it: a bucket on each side, made from log-probabilities at the temperature in use."""
    from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket, _jsd_divergence

    def loss(z: Tensor) -> Tensor:
        found = (z[0] / temperature).log_softmax(-1).gather(-1, ids)
        kept = torch.ones_like(ids, dtype=torch.bool)
        student, mask = _add_tail_bucket(found, kept)
        teacher, _ = _add_tail_bucket(log_p, kept)
        return _jsd_divergence(student, teacher, 0.0, mask).sum()

    return theirs(loss, z_q)


def test_top_k_of_a_server_leaves_the_teacher_at_temperature_1() -> None:
    """A server answers at temperature 1, and TRL tempers the student alone: at T = 2 a student that *is* the teacher is
    pulled away from it. Ours tempers the kept tokens and the tail."""
    z = torch.full((TOKENS, VOCABULARY), -1.0)
    z[:, :KEPT] = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5])  # a uniform tail, for which the tempered one is exact
    log_p, ids = z.log_softmax(-1).topk(KEPT)
    assert server(z, log_p, ids, temperature=2.0)[0] > 0.1 * TOKENS
    ours = run(JSD(beta=0.0, temperature=2.0), z, Tokens(signal=TopK(ids, log_p, "bucket")))
    assert abs(ours[0]) < 1e-4 and np.abs(ours[1]).max() < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_reverse_kl_of_sampled_tokens_has_the_same_gradient_and_another_value(seed: int) -> None:
    """TRL reports `sg[log q - log p] log q`, which estimates nothing; ours reports k1, which estimates the reverse KL."""
    from trl.experimental.sdft.loss_utils import compute_sampled_token_self_distillation_loss

    z_q, z_p = logits(seed), logits(seed + 20)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    log_q, log_p = (z.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for z in (z_q, z_p))
    peer = theirs(lambda z: compute_sampled_token_self_distillation_loss(z, z_p[None], labels[None], distillation_alpha=1.0).sum(), z_q)
    ours = run(ReverseKLPolicyGradient(), z_q, Tokens(labels=labels, signal=PerToken(log_p)))
    same((0.0, ours[1]), (0.0, peer[1]))
    assert ours[0] == pytest.approx((log_q - log_p).sum().item(), rel=1e-4)
    assert peer[0] == pytest.approx(((log_q - log_p) * log_q).sum().item(), rel=1e-4)


@pytest.mark.parametrize("teacher_vocabulary", [VOCABULARY, VOCABULARY + 6])
def test_sorted_probabilities_are_golds(teacher_vocabulary: int) -> None:
    z_q, z_p = logits(11), logits(12, teacher_vocabulary)
    same(run(ULD(), z_q, Tokens(signal=Wider(z_p))), gold(z_q, z_p, 1.0))


def test_sorted_probabilities_at_a_temperature_differ_by_it() -> None:
    """GOLD divides logits by T and stops there; ours multiplies a distance of first order by T."""
    z_q, z_p = logits(13), logits(14)
    peer = gold(z_q, z_p, 3.0)
    same(run(ULD(temperature=3.0, t_scale="none"), z_q, Tokens(signal=Dense(z_p))), peer)
    same(run(ULD(temperature=3.0), z_q, Tokens(signal=Dense(z_p))), (3 * peer[0], 3 * peer[1]))


class Wider:
    """A teacher with a vocabulary of its own, as transport reads it."""

    gives = frozenset({"pair"})

    def __init__(self, z_p: Tensor):
        self.z_p = z_p

    def chunk(self, start: int, stop: int) -> Wider:
        return Wider(self.z_p[start:stop])

    def pair(self, outputs: Any, temperature: float) -> tuple[Tensor, Tensor]:
        return outputs.logprobs(temperature), (self.z_p / temperature).log_softmax(-1)


def gold(z_q: Tensor, z_p: Tensor, temperature: float) -> tuple[float, np.ndarray]:
    """GOLD's distance, summed over the tokens: it divides by their number in each text."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    settings = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=float(TOKENS),
        uld_student_temperature=temperature,
        uld_teacher_temperature=temperature,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="observed",
    )
    labels = torch.ones((1, TOKENS), dtype=torch.int64)
    return theirs(lambda z: ULDLoss(settings)(z, z_p[None], labels, labels, labels, labels), z_q)
