"""Every divergence objective with its float64 reference: what the tests of properties that all share run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from strategies.core import Progress
from strategies.head import TokenLogits
from strategies.objectives.base import Divergence
from strategies.objectives.divergence import AdaptiveKL, ForwardKL, Jeffreys, ReverseKL, TotalVariation
from strategies.objectives.mixtures import JSD, AlphaDivergence, Renyi, SkewKL, SkewReverseKL
from strategies.objectives.taid import Taid
from strategies.signals import Dense, Signal
from tests.strategies import reference_divergences as ref
from tests.strategies.reference import Array, kl, softmax

NOW = Progress(step=0, steps=10)
Frozen = Callable[[Array, Array, float], ref.Value]
"""(z_q, z_p, T) to a function of (q, p), in which whatever the gradient must not see is fixed at z_q."""


@dataclass(frozen=True)
class Case:
    """One setting of one objective."""

    name: str
    objective: Divergence
    frozen: Frozen
    at_high_temperature: float | None = 1.0
    """Logit gradient as T grows, in units of `(centred z_q - centred z_p) / V`; None where it is not of that form."""
    processed: bool = True
    """Whether merging outcomes can only lower it."""
    zero: bool = True
    """Whether it is 0 at p = q."""


def _of(value: ref.Value) -> Frozen:
    return lambda z_q, z_p, temperature: value


def _akl(z_q: Array, z_p: Array, temperature: float) -> ref.Value:
    share = ref.akl_share(softmax(z_q, temperature), softmax(z_p, temperature), 0.5)
    return lambda q, p: ref.akl(q, p, share)


def _taid(z_q: Array, z_p: Array, temperature: float) -> ref.Value:
    target = ref.taid_target(z_q, z_p, 0.4, temperature)
    return lambda q, p: ref.cross(target, q)


def _detached(z_q: Array, z_p: Array, temperature: float) -> ref.Value:
    m = 0.1 * softmax(z_q, temperature) + 0.9 * softmax(z_p, temperature)
    return lambda q, p: kl(q, m)


CASES = [
    Case("forward-kl", ForwardKL(), _of(lambda q, p: kl(p, q))),
    Case("reverse-kl", ReverseKL(), _of(lambda q, p: kl(q, p))),
    Case("jeffreys", Jeffreys(), _of(lambda q, p: kl(p, q) + kl(q, p)), 2.0),
    Case("total-variation", TotalVariation(), _of(ref.tvd), None),
    Case("adaptive-kl", AdaptiveKL(), _akl, processed=False),
    *(Case(f"jsd {b}", JSD(beta=b), _of(lambda q, p, b=b: ref.gjsd(q, p, b))) for b in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(
        Case(f"jsd {b} as in GKD", JSD(beta=b, rescale=False), _of(lambda q, p, b=b: ref.gjsd(q, p, b, False)), b * (1 - b))
        for b in (0.1, 0.5, 0.9)
    ),
    *(Case(f"skew-kl {s}", SkewKL(skew=s), _of(lambda q, p, s=s: ref.skew_fkl(q, p, s)), (1 - s) ** 2) for s in (0.0, 0.1, 0.5)),
    *(
        Case(f"skew-reverse-kl {s}", SkewReverseKL(skew=s), _of(lambda q, p, s=s: ref.skew_rkl(q, p, s)), (1 - s) ** 2)
        for s in (0.0, 0.1, 0.5)
    ),
    Case("skew-reverse-kl detached", SkewReverseKL(detach_mix=True), _detached, 0.9),
    *(Case(f"alpha {a}", AlphaDivergence(alpha=a), _of(lambda q, p, a=a: ref.amari(q, p, a))) for a in (0.2, 0.5, 0.8)),
    *(Case(f"renyi {a}", Renyi(alpha=a), _of(lambda q, p, a=a: ref.renyi(q, p, a)), a) for a in (0.3, 0.9, 1.5, 4.0)),
    Case("taid", Taid(progress_share=0.4), _taid, 0.4, processed=False, zero=False),
]
IDS = [case.name for case in CASES]


def logits(seed: int, shape: tuple[int, int] = (6, 19), size: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, shape).astype(np.float32)


def student(z_q: np.ndarray, labels: np.ndarray | None = None) -> TokenLogits:
    given = np.zeros(len(z_q), dtype=np.int64) if labels is None else labels
    return TokenLogits(torch.from_numpy(np.array(z_q)).requires_grad_(), torch.from_numpy(given))


def dense(z_p: np.ndarray) -> Dense:
    return Dense(torch.from_numpy(np.array(z_p)))


def loss_and_gradient(
    objective: Divergence, z_q: np.ndarray, signal: Signal, weights: np.ndarray | None = None, progress: Progress = NOW
) -> tuple[float, np.ndarray]:
    outputs = student(z_q)
    given = torch.ones(len(z_q)) if weights is None else torch.from_numpy(weights).float()
    loss = objective(outputs, signal, given, progress)
    (slope,) = torch.autograd.grad(loss, outputs.logits)
    return loss.item(), slope.numpy()
