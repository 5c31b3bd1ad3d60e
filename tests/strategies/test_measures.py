"""What evaluation measures, for every kind of distribution, and against float64 definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strategies.objectives.measures import measures
from strategies.signals import Sampled, Signal, TopK
from tests.strategies import reference
from tests.strategies.families import NOW, dense, logits, student

Z_Q, Z_P = logits(0), logits(100)
WEIGHTS = np.asarray([0, 1, 1, 2, 1, 1], dtype=np.float32)
K = 7


def measured(signal: Signal) -> dict[str, float]:
    outputs = student(Z_Q)
    return {name: measure(outputs, signal, torch.from_numpy(WEIGHTS), NOW).item() for name, measure in measures().items()}


def test_a_dense_teacher_is_measured_exactly() -> None:
    q, p = reference.softmax(Z_Q), reference.softmax(Z_P)
    mine, theirs = np.argsort(-q, -1), np.argsort(-p, -1)
    fives = [len(set(a[:5]) & set(b[:5])) / 5 for a, b in zip(mine, theirs, strict=True)]
    wanted = {
        "forward_kl": reference.kl(p, q),
        "reverse_kl": reference.kl(q, p),
        "top1_agreement": mine[:, 0] == theirs[:, 0],
        "top5_agreement": np.asarray(fives),
        "teacher_topk_mass": np.ones(6),
        "student_topk_mass": np.ones(6),
    }
    assert measured(dense(Z_P)) == pytest.approx({name: float((WEIGHTS * values).sum()) for name, values in wanted.items()}, rel=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
def test_a_top_k_is_measured_on_its_own_outcomes(tail: str) -> None:
    ids, logprobs = reference.top(Z_P, K)
    q, p = reference.paired(Z_Q, ids, logprobs, 1.0, tail)
    signal = TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float(), tail)  # type: ignore[arg-type]
    found = measured(signal)
    assert found["forward_kl"] == pytest.approx((WEIGHTS * reference.kl(p, q)).sum(), rel=1e-4)
    assert found["reverse_kl"] == pytest.approx((WEIGHTS * reference.kl(q, p)).sum(), rel=1e-4)
    assert found["top1_agreement"] == measured(dense(Z_P))["top1_agreement"]
    assert found["top5_agreement"] == pytest.approx(measured(dense(Z_P))["top5_agreement"])
    assert found["teacher_topk_mass"] == pytest.approx((WEIGHTS * np.exp(logprobs).sum(-1)).sum(), rel=1e-5)
    kept = np.take_along_axis(reference.softmax(Z_Q), ids, -1).sum(-1)
    assert found["student_topk_mass"] == pytest.approx((WEIGHTS * kept).sum(), rel=1e-5)


def test_fewer_teacher_tokens_than_five_are_compared_with_as_many_of_the_students() -> None:
    ids, logprobs = reference.top(Z_P, 2)
    found = measured(TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float()))
    mine = np.argsort(-Z_Q, -1)[:, :2]
    shared = [len(set(a) & set(b)) / 2 for a, b in zip(mine, ids, strict=True)]
    assert found["top5_agreement"] == pytest.approx((WEIGHTS * shared).sum())


def test_draws_have_a_forward_kl_and_nothing_else() -> None:
    draws = Sampled(torch.zeros((6, 1), dtype=torch.int64), torch.zeros((6, 1)), torch.ones((6, 1)))
    for name, measure in measures().items():
        if name == "forward_kl":
            assert np.isfinite(measure(student(Z_Q), draws, torch.ones(6), NOW).item())
            continue
        with pytest.raises(ValueError, match="cannot read the signal Sampled; expected"):
            measure(student(Z_Q), draws, torch.ones(6), NOW)


def test_a_measure_without_a_signal_says_what_is_missing() -> None:
    for measure in measures().values():
        with pytest.raises(ValueError, match="names no signal"):
            measure(student(Z_Q), None, torch.ones(6), NOW)
