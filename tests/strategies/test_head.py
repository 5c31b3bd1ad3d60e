"""The chunked head against the whole `(N, V)` computed at once in float64: values, gradients, and every odd shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies import cut
from strategies.core import Progress, Term
from strategies.head import Head, TermSums, TokenBatch, TokenLogits, chunked_terms
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from strategies.signals import Signal, TopK
from tests.strategies import reference
from tests.strategies.reference import HeadCase

NOW = Progress(step=0, steps=10)
TEMPERATURE, CE_SCALE, KD_SCALE = 2.0, 0.03, 0.2
SCALES = {"ce": CE_SCALE, "kd": KD_SCALE}
CE = Term("ce", CrossEntropy(), constant(1.0))
KD = Term("kd", ForwardKL(temperature=TEMPERATURE), constant(1.0), signal="teacher")
TERMS = (KD, CE)
WIDTH, VOCABULARY, KEPT = 8, 31, 6
CHUNKS = [1, 3, 10, 11, 1000]


def make_case(seed: int = 0, tokens: int = 11) -> HeadCase:
    draw = np.random.default_rng(seed)
    ids, logprobs = reference.top(draw.normal(0, 2, (tokens, VOCABULARY)), KEPT)
    return HeadCase(
        hidden=_float32(draw.normal(0, 1, (tokens, WIDTH))),
        weight=_float32(draw.normal(0, 0.7, (VOCABULARY, WIDTH))),
        bias=_float32(draw.normal(0, 0.5, VOCABULARY)),
        ids=ids,
        logprobs=logprobs,
        labels=draw.integers(0, VOCABULARY, tokens),
        ce_weights=_float32(draw.integers(0, 3, tokens)),
        kd_weights=_float32(draw.random(tokens)),
    )


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def expected(case: HeadCase) -> reference.HeadSums:
    return reference.head_sums(case, TEMPERATURE, CE_SCALE, KD_SCALE)


def batch_of(case: HeadCase) -> TokenBatch:
    signals: dict[str, Signal] = {"teacher": TopK(torch.from_numpy(case.ids), torch.from_numpy(case.logprobs).float())}
    weights = {"ce": torch.from_numpy(case.ce_weights).float(), "kd": torch.from_numpy(case.kd_weights).float()}
    return TokenBatch(labels=torch.from_numpy(case.labels), signals=signals, weights=weights)


@dataclass(frozen=True)
class Leaves:
    """Tensors that collect gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def leaves(case: HeadCase, dtype: torch.dtype = torch.float32) -> Leaves:
    hidden = torch.from_numpy(case.hidden).to(dtype).requires_grad_()
    return Leaves(hidden, *(torch.from_numpy(a).float().requires_grad_() for a in (case.weight, case.bias)))


def run(case: HeadCase, on: Leaves, chunk_tokens: int = 3) -> TermSums:
    return chunked_terms(on.hidden, Head(on.weight, on.bias), batch_of(case), TERMS, SCALES, NOW, chunk_tokens)


def close(got: Tensor | None, want: np.ndarray, share: float = 1e-5) -> None:
    """Equal to a share of the largest entry; zeros must be zeros."""
    assert got is not None
    np.testing.assert_allclose(got.detach().double().numpy(), want, rtol=share, atol=share * max(np.abs(want).max(initial=0.0), 1e-7))


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("seed", range(3))
def test_any_chunking_gives_the_sums_and_gradients_of_the_whole(seed: int, chunk_tokens: int) -> None:
    case = make_case(seed)
    on, want = leaves(case), expected(case)
    got = run(case, on, chunk_tokens)
    got.loss.backward()
    assert got.sums["ce"].item() == pytest.approx(want.ce, rel=1e-5)
    assert got.sums["kd"].item() == pytest.approx(want.kd, rel=1e-5)
    assert got.loss.item() == pytest.approx(want.loss, rel=1e-5)
    close(on.hidden.grad, want.hidden)
    close(on.weight.grad, want.weight)
    close(on.bias.grad, want.bias)


def test_the_default_cut_gives_the_same_over_its_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "BLOCK_BYTES", 4 * VOCABULARY * 64)
    monkeypatch.setattr(cut, "PIECE_BYTES", 4 * VOCABULARY * 5)
    case = make_case(tokens=64 + 6)
    assert cut.cut_for(VOCABULARY, "cpu") == cut.Cut(block_tokens=64, piece_tokens=5)
    on, want = leaves(case), expected(case)
    got = chunked_terms(on.hidden, Head(on.weight, on.bias), batch_of(case), TERMS, SCALES, NOW)
    got.loss.backward()
    close(on.hidden.grad, want.hidden)
    close(on.weight.grad, want.weight, share=5e-5)


def test_a_head_without_bias_is_a_head_with_a_zero_bias() -> None:
    case = replace(make_case(), bias=np.zeros(VOCABULARY))
    on, want = leaves(case), expected(case)
    got = chunked_terms(on.hidden, Head(on.weight), batch_of(case), TERMS, SCALES, NOW, 4)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(want.loss, rel=1e-5)
    close(on.hidden.grad, want.hidden)
    close(on.weight.grad, want.weight)


def test_a_tied_head_adds_to_the_gradient_of_the_embedding() -> None:
    case = make_case()
    read = np.random.default_rng(5).integers(0, VOCABULARY, len(case.labels))
    case = replace(case, hidden=case.weight[read])  # the network is the embedding alone
    want = expected(case)
    by_embedding = want.weight.copy()
    np.add.at(by_embedding, read, want.hidden)
    shared = torch.from_numpy(case.weight).float().requires_grad_()
    hidden = torch.nn.functional.embedding(torch.from_numpy(read), shared)
    head = Head(shared, torch.from_numpy(case.bias).float())
    chunked_terms(hidden, head, batch_of(case), TERMS, SCALES, NOW, 4).loss.backward()
    close(shared.grad, by_embedding)


def test_a_frozen_head_passes_gradients_through_and_takes_none() -> None:
    case = make_case()
    on, want = leaves(case), expected(case)
    on.weight.requires_grad_(False)
    on.bias.requires_grad_(False)
    run(case, on).loss.backward()
    close(on.hidden.grad, want.hidden)
    assert on.weight.grad is None and on.bias.grad is None


def test_a_head_alone_can_be_trained_on_frozen_hidden_states() -> None:
    case = make_case()
    on, want = leaves(case), expected(case)
    on.hidden.requires_grad_(False)
    run(case, on).loss.backward()
    close(on.weight.grad, want.weight)
    close(on.bias.grad, want.bias)
    assert on.hidden.grad is None


def test_gradients_are_handed_out_again_where_that_is_asked_for() -> None:
    case = make_case()
    on, want = leaves(case), expected(case)
    got = chunked_terms(on.hidden, Head(on.weight, on.bias), batch_of(case), TERMS, SCALES, NOW, 3, repeatable=True)
    (first,) = torch.autograd.grad(2.0 * got.loss, on.hidden, retain_graph=True)
    close(first / 2.0, want.hidden)
    got.loss.backward()
    close(on.hidden.grad, want.hidden)
    close(on.weight.grad, want.weight)
    close(on.bias.grad, want.bias)


def test_one_token_is_enough() -> None:
    case = make_case(tokens=1)
    on, want = leaves(case), expected(case)
    run(case, on).loss.backward()
    close(on.hidden.grad, want.hidden)


def test_no_tokens_give_zero_and_still_a_backward_for_ranks_to_meet_in() -> None:
    case = make_case(tokens=0)
    on = leaves(case)
    got = run(case, on)
    got.loss.backward()
    assert (got.loss.item(), got.sums["ce"].item(), got.sums["kd"].item()) == (0.0, 0.0, 0.0)
    for leaf in (on.hidden, on.weight, on.bias):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_zero_weights_give_zero_gradients() -> None:
    nothing = np.zeros(11)
    case = replace(make_case(), ce_weights=nothing, kd_weights=nothing)
    on = leaves(case)
    got = run(case, on)
    got.loss.backward()
    assert got.loss.item() == 0.0
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (on.hidden, on.weight, on.bias))


def test_a_term_without_weights_weighs_every_token_one() -> None:
    case = replace(make_case(), ce_weights=np.ones(11))
    batch = replace(batch_of(case), weights={"kd": batch_of(case).weights["kd"]})
    on = leaves(case)
    got = chunked_terms(on.hidden, Head(on.weight, on.bias), batch, TERMS, SCALES, NOW, 4)
    assert got.sums["ce"].item() == pytest.approx(expected(case).ce, rel=1e-5)


def test_a_term_scaled_to_zero_is_measured_but_teaches_nothing() -> None:
    case = make_case()
    on = leaves(case)
    got = chunked_terms(on.hidden, Head(on.weight, on.bias), batch_of(case), TERMS, {"ce": 0.0, "kd": KD_SCALE}, NOW, 4)
    got.loss.backward()
    assert got.sums["ce"].item() == pytest.approx(expected(case).ce, rel=1e-5)
    close(on.hidden.grad, reference.head_sums(case, TEMPERATURE, 0.0, KD_SCALE).hidden)


def test_whatever_multiplies_the_loss_multiplies_its_gradients() -> None:
    case = make_case()
    on, want = leaves(case), expected(case)
    (3.0 * run(case, on).loss).backward()
    close(on.hidden.grad, 3 * want.hidden)
    close(on.weight.grad, 3 * want.weight)
    close(on.bias.grad, 3 * want.bias)


def test_micro_batches_add_up_to_the_whole_step() -> None:
    case = make_case()
    on, want = leaves(case), expected(case)
    for start, stop in ((0, 2), (2, 3), (3, 11)):
        batch = batch_of(case)
        part = TokenBatch(
            labels=batch.labels[start:stop],
            signals={"teacher": batch.signals["teacher"].chunk(start, stop)},
            weights={name: w[start:stop] for name, w in batch.weights.items()},
        )
        chunked_terms(on.hidden[start:stop], Head(on.weight, on.bias), part, TERMS, SCALES, NOW, 3).loss.backward()
    close(on.hidden.grad, want.hidden)
    close(on.weight.grad, want.weight)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_hidden_states_stay_within_their_own_rounding(seed: int) -> None:
    case = make_case(seed, tokens=64)
    rounded = [torch.from_numpy(a).bfloat16().double().numpy() for a in (case.hidden, case.weight, case.bias)]
    case = replace(case, hidden=rounded[0], weight=rounded[1], bias=rounded[2])
    on, want = leaves(case, torch.bfloat16), expected(case)
    got = run(case, on, chunk_tokens=16)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(want.loss, rel=1e-2)
    assert on.hidden.grad is not None and on.hidden.grad.dtype == torch.bfloat16
    assert on.weight.grad is not None and on.weight.grad.dtype == torch.float32
    for grad, exact in ((on.hidden.grad, want.hidden), (on.weight.grad, want.weight)):
        assert np.linalg.norm(grad.double().numpy() - exact) < 2e-2 * np.linalg.norm(exact)


def test_bfloat16_chunks_accumulate_the_weight_gradient_in_float32() -> None:
    """In bfloat16 the small second token would vanish beside the first."""
    case = make_case(tokens=2)
    case = replace(case, hidden=np.asarray([[256.0] + [0.0] * 7, [1.0] + [0.0] * 7]), weight=np.zeros((VOCABULARY, WIDTH)))
    case = replace(case, bias=np.zeros(VOCABULARY), labels=np.asarray([3, 3]), ce_weights=np.ones(2))
    on = leaves(case, torch.bfloat16)
    terms, scales = (CE,), {"ce": 1.0}
    chunked_terms(on.hidden, Head(on.weight, on.bias), batch_of(case), terms, scales, NOW, 1).loss.backward()
    assert on.weight.grad is not None
    pull = float(torch.tensor(1 / VOCABULARY - 1).bfloat16())
    assert on.weight.grad[3, 0].item() == pytest.approx(257 * pull, rel=1e-4)


def _soft_cap(logits: Tensor) -> Tensor:
    return 3.0 * torch.tanh(logits / 3.0)


@pytest.mark.parametrize("transform", [_soft_cap, torch.tanh], ids=["soft cap", "a function that keeps its output for backward"])
def test_transformed_logits_match_plain_autograd(transform: Callable[[Tensor], Tensor]) -> None:
    case = make_case()
    on, plain = leaves(case), leaves(case)
    head = Head(on.weight, on.bias, transform=transform)
    got = chunked_terms(on.hidden, head, batch_of(case), TERMS, SCALES, NOW, 4)
    got.loss.backward()
    logits = transform(plain.hidden @ plain.weight.T + plain.bias)
    outputs, batch = TokenLogits(logits, batch_of(case).labels), batch_of(case)
    kd = KD.objective(outputs, batch.signals["teacher"], batch.weights["kd"], NOW)
    ce = CE.objective(outputs, None, batch.weights["ce"], NOW)
    (KD_SCALE * kd + CE_SCALE * ce).backward()
    for leaf, want in ((on.hidden, plain.hidden), (on.weight, plain.weight), (on.bias, plain.bias)):
        assert want.grad is not None
        close(leaf.grad, want.grad.double().numpy())


def test_nothing_is_computed_for_a_gradient_that_nobody_wants() -> None:
    case = make_case()
    on = leaves(case)
    with torch.no_grad():
        got = run(case, on)
    assert not got.loss.requires_grad
    assert got.loss.item() == pytest.approx(expected(case).loss, rel=1e-5)


def test_an_objective_sees_one_chunk_at_a_time_and_where_the_run_stands() -> None:
    seen: list[tuple[int, Progress]] = []

    def note(outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        assert len(outputs.logits) == len(outputs.labels) == len(weights)
        seen.append((len(outputs.logits), progress))
        return outputs.logits.sum()

    case, later = make_case(), Progress(step=7, steps=9)
    on, terms = leaves(case), (Term("note", note, constant(1.0)),)
    chunked_terms(on.hidden, Head(on.weight, on.bias), batch_of(case), terms, {"note": 1.0}, later, 4)
    assert seen == [(4, later), (4, later), (3, later)]


@pytest.mark.parametrize("normaliser_first", [True, False])
def test_the_order_in_which_terms_ask_does_not_change_what_they_get(normaliser_first: bool) -> None:
    z = np.random.default_rng(0).normal(0, 2, (1, VOCABULARY)).astype(np.float32)
    outputs = TokenLogits(torch.from_numpy(z), torch.zeros(1, dtype=torch.int64))
    if normaliser_first:
        outputs.normaliser(2.0)
    inside, outside = outputs.partition(torch.tensor([[1, 4]]), 2.0, want_tail=True)
    want = reference.softmax(z, 2.0)[0, [1, 4]]
    assert outputs.normaliser(2.0).item() == pytest.approx(np.log(np.exp(z.astype(np.float64) / 2).sum()), rel=1e-6)
    np.testing.assert_allclose(inside.exp().numpy()[0], want, rtol=1e-5)
    assert outside is not None and outside.exp().item() == pytest.approx(1 - want.sum(), rel=1e-5)
