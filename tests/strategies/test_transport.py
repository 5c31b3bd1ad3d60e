"""Transport distances: sorted probabilities that are blind to identity, and tokens matched within a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from strategies.core import Progress, Reads
from strategies.head import TokenLogits
from strategies.objectives.transport import ULD, Sinkhorn, transport_cost, uld
from strategies.schedule import Ramp
from strategies.signals import TopK
from tests.strategies import reference
from tests.strategies import reference_transport as exact
from tests.strategies.chunking import Tokens, dense, floats, run, same

SEEDS = range(4)
TOKENS, VOCABULARY = 5, 7
ONES = np.ones(TOKENS)


def logits(seed: int, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, (tokens, vocabulary)).astype(np.float32)


def logs(z: np.ndarray) -> Tensor:
    return torch.from_numpy(np.log(reference.softmax(z)))


@dataclass(frozen=True)
class OtherTokenizer:
    """A teacher of another vocabulary, whose positions are the student's."""

    logits: Tensor
    gives: ClassVar[frozenset[Reads]] = frozenset({"pair"})

    def chunk(self, start: int, stop: int) -> OtherTokenizer:
        return OtherTokenizer(self.logits[start:stop])

    def pair(self, outputs: TokenLogits, temperature: float) -> tuple[Tensor, Tensor]:
        return outputs.logprobs(temperature), (self.logits / temperature).log_softmax(-1)


# Universal logit distillation.


@pytest.mark.parametrize("widths", [(7, 7), (7, 4), (3, 7)])
@pytest.mark.parametrize("seed", SEEDS)
def test_uld_is_the_distance_of_sorted_probabilities_with_zeros_for_what_one_side_lacks(seed: int, widths: tuple[int, int]) -> None:
    z_q, z_p = logits(seed, vocabulary=widths[0]), logits(seed + 50, vocabulary=widths[1])
    want = exact.sorted_distance(reference.softmax(z_p), reference.softmax(z_q))
    np.testing.assert_allclose(uld(logs(z_q), logs(z_p)).numpy(), want, rtol=1e-9)
    assert (want >= 0).all() and (want <= 2).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_uld_does_not_know_which_token_is_which(seed: int) -> None:
    draw = np.random.default_rng(seed)
    z_q, z_p = logits(seed), logits(seed + 50)
    want = uld(logs(z_q), logs(z_p))
    for _ in range(3):
        one, other = draw.permutation(VOCABULARY), draw.permutation(VOCABULARY)
        np.testing.assert_allclose(uld(logs(z_q[:, one]), logs(z_p[:, other])).numpy(), want.numpy(), rtol=1e-9)
    assert uld(logs(z_p[:, draw.permutation(VOCABULARY)]), logs(z_p)).abs().max() < 1e-12


def test_uld_reaches_two_only_between_a_sure_and_a_spread_out_side() -> None:
    sure, spread = torch.full((1, 1000), -torch.inf), torch.full((1, 1000), -np.log(1000.0))
    sure[0, 3] = 0.0
    assert uld(sure, spread.float()).item() == pytest.approx(2 - 2 / 1000, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_uld_term_scales_by_the_temperature_once(seed: int, temperature: float) -> None:
    z_q, z_p = logits(seed), logits(seed + 50)
    weights = np.asarray([0.0, 1.0, 2.0, 0.5, 1.0])
    p = reference.softmax(z_p, temperature)

    def value(z: np.ndarray) -> float:
        return float(temperature * (weights * exact.sorted_distance(p, reference.softmax(z, temperature))).sum())

    tokens, z = Tokens(signal=dense(z_p), weights=weights), z_q.astype(np.float64)
    same(run(ULD(temperature=temperature), z_q, tokens), (value(z), exact.slope(value, z)), rtol=5e-5)
    unscaled = run(ULD(temperature=temperature, t_scale="none"), z_q, tokens)
    assert unscaled[0] * temperature == pytest.approx(value(z), rel=1e-5)


def test_the_uld_gradient_keeps_its_size_as_the_temperature_grows() -> None:
    z_q, z_p = logits(0), logits(50)
    sizes = [np.abs(run(ULD(temperature=t), z_q, Tokens(signal=dense(z_p)))[1]).max() for t in (100.0, 1000.0)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_uld_takes_a_teacher_of_another_vocabulary_and_a_top_k_one() -> None:
    z_q, z_p = logits(0), logits(50, vocabulary=4)
    tokens = Tokens(signal=OtherTokenizer(floats(z_p)))
    want = exact.sorted_distance(reference.softmax(z_p), reference.softmax(z_q)).sum()
    assert run(ULD(), z_q, tokens)[0] == pytest.approx(want, rel=1e-5)
    ids, logprobs = reference.top(logits(50), 3)
    q, p = reference.paired(z_q, ids, logprobs, 1.0, "bucket")
    kept = Tokens(signal=TopK(torch.from_numpy(ids), floats(logprobs)))
    assert run(ULD(), z_q, kept)[0] == pytest.approx(exact.sorted_distance(p, q).sum(), rel=1e-5)


# Sinkhorn.


def test_the_plan_is_made_by_scaling_rows_and_columns_in_turn() -> None:
    for seed in SEEDS:
        p, q = reference.softmax(logits(seed)), reference.softmax(logits(seed + 50))
        for masses in (ONES, np.asarray([0.5, 1.0, 2.0, 3.0, 0.1])):
            for strength, iterations in ((0.1, 20), (0.5, 1), (1.0, 3)):
                got = transport_cost(*(torch.from_numpy(a) for a in (p, q, masses)), strength, iterations)
                assert got.item() == pytest.approx(exact.sinkhorn(p, q, masses, strength, iterations), rel=1e-9)


def test_the_gradient_goes_through_the_scalings() -> None:
    p = torch.from_numpy(reference.softmax(logits(50, 3, 4)))
    z = torch.from_numpy(logits(0, 3, 4)).double().requires_grad_()
    masses = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: transport_cost(p, z.softmax(-1), masses, 0.3, 5), (z,))
    assert torch.autograd.gradcheck(lambda z: transport_cost(z.softmax(-1), z.softmax(-1), masses, 0.3, 5), (z,))


def whole(z_q: np.ndarray, z_p: np.ndarray, weights: np.ndarray, temperature: float = 2.0, debias: bool = False) -> float:
    """T times the transport between tokens of weight above 0, all in one chunk."""
    live = weights > 0
    q, p, masses = reference.softmax(z_q[live], temperature), reference.softmax(z_p[live], temperature), weights[live]
    cost = exact.sinkhorn(p, q, masses, 0.1, 20)
    if debias:
        cost -= 0.5 * (exact.sinkhorn(p, p, masses, 0.1, 20) + exact.sinkhorn(q, q, masses, 0.1, 20))
    return temperature * cost


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("weights", [ONES, np.asarray([0.0, 1.0, 2.0, 0.0, 0.5])])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_sinkhorn_term_by_its_formula(seed: int, weights: np.ndarray, debias: bool) -> None:
    z_q, z_p = logits(seed), logits(seed + 50)
    tokens = Tokens(signal=dense(z_p), weights=weights)
    got = run(Sinkhorn(debias=debias), z_q, tokens, chunk_tokens=TOKENS)
    z = z_q.astype(np.float64)
    want = exact.slope(lambda z: whole(z, z_p, weights, debias=debias), z)
    same(got, (whole(z, z_p, weights, debias=debias), want), rtol=2e-4)
    assert not got[1][weights == 0].any()


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_tokens_does_not_matter_and_each_side_may_be_shuffled_alone(seed: int, debias: bool) -> None:
    z_q, z_p = logits(seed), logits(seed + 50)
    value, gradient = run(Sinkhorn(debias=debias), z_q, Tokens(signal=dense(z_p)), chunk_tokens=TOKENS)
    draw = np.random.default_rng(seed)
    one, other = draw.permutation(TOKENS), draw.permutation(TOKENS)
    again = run(Sinkhorn(debias=debias), z_q[one], Tokens(signal=dense(z_p[other])), chunk_tokens=TOKENS)
    same(again, (value, gradient[one]), rtol=2e-4)


def test_the_geometry_is_the_tokens_at_once_whatever_the_heads_chunk() -> None:
    """The student's tokens moved by one: all together are matched for nothing, one at a time they are not matched at all."""
    z_q, z_p = logits(0), np.roll(logits(0), 1, axis=0)
    tokens, converged = Tokens(signal=dense(z_p)), Sinkhorn(regularisation=0.01, iterations=400)
    kinds = {n: converged.model_copy(update={"tokens_at_once": n}) for n in (1, 3, TOKENS)}
    by_chunk = {n: run(objective, z_q, tokens, TOKENS)[0] for n, objective in kinds.items()}
    assert all(run(objective, z_q, tokens, 2)[0] == pytest.approx(by_chunk[n], rel=1e-5, abs=1e-6) for n, objective in kinds.items())
    distance = 2.0 * np.abs(reference.softmax(z_p, 2.0) - reference.softmax(z_q, 2.0)).sum()
    assert by_chunk[1] == pytest.approx(distance, rel=1e-5)
    assert by_chunk[1] > by_chunk[3] + 0.1 > by_chunk[TOKENS] + 0.2 and by_chunk[TOKENS] < 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_vanishing_regularisation_matches_equal_tokens_at_no_cost(seed: int) -> None:
    z = logits(seed)
    costs = [run(Sinkhorn(regularisation=e), z, Tokens(signal=dense(z)), TOKENS)[0] for e in (0.5, 0.1, 0.02, 0.002)]
    assert costs[0] > costs[1] > costs[2] >= costs[3] >= 0 and costs[0] > 0.1
    assert costs[3] < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_debiased_it_is_nothing_where_both_agree_and_the_gradient_goes_with_convergence(seed: int) -> None:
    z, tokens = logits(seed), Tokens(signal=dense(logits(seed)))
    value, gradient = run(Sinkhorn(debias=True), z, tokens, TOKENS)
    assert abs(value) < 1e-5 and np.isfinite(gradient).all()
    converged = run(Sinkhorn(debias=True, iterations=400), z, tokens, TOKENS)[1]
    assert np.abs(converged).max() < 1e-4
    assert np.abs(run(Sinkhorn(), z, tokens, TOKENS)[1]).max() > 1e-3


def test_masses_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="negative token weight"):
        run(Sinkhorn(), logits(0), Tokens(signal=dense(logits(50)), weights=-ONES))


@pytest.mark.parametrize("objective", [ULD(), Sinkhorn(), Sinkhorn(debias=True)])
def test_edges_are_quiet(objective: Any) -> None:
    z_q, z_p = logits(0), logits(50)
    none = run(objective, z_q[:0], Tokens(signal=dense(z_p[:0])))
    assert none[0] == 0.0 and none[1].shape == (0, VOCABULARY)
    masked = run(objective, z_q, Tokens(signal=dense(z_p), weights=np.zeros(TOKENS)))
    assert masked[0] == 0.0 and not masked[1].any()
    z_q[:, 2] = z_p[:, 2] = z_p[:, 4] = -np.inf
    value, gradient = run(objective, z_q, Tokens(signal=dense(z_p)))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[:, 2].any()
    with pytest.raises(ValueError, match="names no signal"):
        run(objective, z_q, Tokens())


def test_uld_is_nothing_where_both_agree() -> None:
    value, gradient = run(ULD(temperature=2.0), logits(0), Tokens(signal=dense(logits(0))))
    assert abs(value) < 1e-5
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_settings_move_with_progress_and_stay_in_range() -> None:
    half, tokens = Progress(step=5, steps=10), Tokens(signal=dense(logits(50)))
    slow = Sinkhorn(temperature=Ramp(ramp=(1.0, 3.0)), regularisation=Ramp(ramp=(0.1, 0.3)))
    same(run(slow, logits(0), tokens, progress=half), run(Sinkhorn(regularisation=0.2), logits(0), tokens))
    same(run(ULD(temperature=Ramp(ramp=(1.0, 3.0))), logits(0), tokens, progress=half), run(ULD(temperature=2.0), logits(0), tokens))
    for wrong in ({"regularisation": 0.0}, {"iterations": 0}, {"temperature": -1.0}):
        with pytest.raises(ValidationError):
            Sinkhorn(**wrong)


def test_the_sinkhorn_term_is_multiplied_by_the_temperature_unless_told_not_to() -> None:
    tokens = Tokens(signal=dense(logits(50)), weights=ONES)
    scaled, plain = (run(Sinkhorn(t_scale=how), logits(0), tokens, chunk_tokens=TOKENS)[0] for how in ("auto", "none"))
    assert scaled == pytest.approx(2.0 * plain, rel=1e-5)
