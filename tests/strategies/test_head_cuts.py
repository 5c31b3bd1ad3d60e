"""How the head cuts its work: what exists at once, what objectives see, and what is made for whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from strategies import cut
from strategies.core import Objective, Progress, Reads, Term
from strategies.cut import Cut, cut_for
from strategies.head import Head, TermSums, TokenBatch, TokenLogits, chunked_terms
from strategies.objectives.divergence import ForwardKL, ReverseKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.outputs import RecordedLogits
from strategies.schedule import constant
from strategies.signals import Hidden, Signal, TopK
from tests.strategies import reference

NOW = Progress(step=0, steps=10)
TOKENS, WIDTH, VOCABULARY, KEPT = 40, 2, 64, 4
BLOCK, PIECE = 8, 3


@pytest.fixture(autouse=True)
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "PIECE_BYTES", 4 * VOCABULARY * PIECE)


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    batch: TokenBatch


def case(seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(0, 1, shape)).to(dtype)

    ids, logprobs = reference.top(rng.normal(0, 2, (tokens, VOCABULARY)), KEPT)
    teacher = normal(tokens, WIDTH), normal(VOCABULARY, WIDTH)
    signals: dict[str, Signal] = {
        "top": TopK(torch.from_numpy(ids), torch.from_numpy(logprobs).float()),
        "states": Hidden(teacher[0], Head(teacher[1])),
    }
    batch = TokenBatch(torch.from_numpy(rng.integers(0, VOCABULARY, tokens)), signals, {})
    return Case(normal(tokens, WIDTH).requires_grad_(), normal(VOCABULARY, WIDTH).float().requires_grad_(), *teacher, batch)


def run(on: Case, *terms: Term, chunk_tokens: int | None = BLOCK) -> TermSums:
    scales = dict.fromkeys((t.name for t in terms), 0.5)
    return chunked_terms(on.hidden, Head(on.weight), on.batch, terms, scales, NOW, chunk_tokens)


CE = Term("ce", CrossEntropy(), constant(1.0))
KD = Term("kd", ForwardKL(temperature=2.0), constant(1.0), signal="top")
WHOLE = Term("whole", ForwardKL(temperature=2.0), constant(1.0), signal="states")
BACK = Term("back", ReverseKL(), constant(1.0), signal="top")


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor has which an operator makes, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for made in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(made, Tensor):
                self.elements[made.dtype] = max(self.elements.get(made.dtype, 0), made.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [(KD, CE, BACK), (WHOLE,)], ids=["top-k", "hidden states"])
def test_logits_of_all_tokens_never_exist(terms: tuple[Term, ...], dtype: torch.dtype) -> None:
    on, largest = case(dtype=dtype), Largest()
    with largest:
        run(on, *terms).loss.backward()
    assert on.hidden.grad is not None
    assert largest.elements[dtype] == BLOCK * VOCABULARY < TOKENS * VOCABULARY
    if dtype != torch.float32:  # float32 copies are of a piece alone
        assert largest.elements[torch.float32] == PIECE * VOCABULARY


def test_the_whole_would_be_noticed() -> None:
    on, largest = case(), Largest()
    with largest:
        (on.hidden @ on.weight.T).log_softmax(-1).sum().backward()
    assert largest.elements[torch.float32] == TOKENS * VOCABULARY


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk_tokens", [1, BLOCK, TOKENS, None])
def test_hidden_states_of_a_teacher_teach_its_whole_distribution(seed: int, chunk_tokens: int | None) -> None:
    on, temperature = case(seed), 2.0
    got = run(on, WHOLE, chunk_tokens=chunk_tokens)
    got.loss.backward()
    hidden, weight = on.hidden.detach().double().numpy(), on.weight.detach().double().numpy()
    q = reference.softmax(hidden @ weight.T, temperature)
    p = reference.softmax((on.teacher_hidden.double() @ on.teacher_weight.double().T).numpy(), temperature)
    by_logits = 0.5 * temperature * (q - p)
    assert got.loss.item() == pytest.approx(0.5 * temperature**2 * reference.kl(p, q).sum(), rel=1e-5)
    assert on.hidden.grad is not None and on.weight.grad is not None
    np.testing.assert_allclose(on.hidden.grad.numpy(), by_logits @ weight, atol=1e-5)
    np.testing.assert_allclose(on.weight.grad.numpy(), by_logits.T @ hidden, atol=3e-5)


def test_a_teachers_logits_are_transformed_like_its_own() -> None:
    on = case()
    capped, plain = (Head(on.teacher_weight, transform=f) for f in (torch.tanh, None))
    q = TokenLogits(on.hidden.detach() @ on.weight.detach().T, on.batch.labels)
    signal, want = Hidden(on.teacher_hidden, capped), plain.logits(on.teacher_hidden).tanh().log_softmax(-1)
    for found in (signal, signal.ready()):
        np.testing.assert_allclose(found.pair(q, 1.0)[1].numpy(), want.numpy(), rtol=1e-5, atol=1e-6)


def test_a_transformed_student_is_measured_as_it_is_taught() -> None:
    on = case()
    head = Head(on.weight, transform=torch.tanh)
    want = chunked_terms(on.hidden, head, on.batch, (KD,), {"kd": 1.0}, NOW, BLOCK)
    with torch.no_grad():
        got = chunked_terms(on.hidden, head, on.batch, (KD,), {"kd": 1.0}, NOW, BLOCK)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)


def test_whole_logits_of_a_head_can_be_differentiated() -> None:
    on = case()
    Head(on.weight).logits(on.hidden).sum().backward()
    assert on.hidden.grad is not None and on.weight.grad is not None
    assert Head(on.weight).logits(on.hidden.bfloat16()).dtype == torch.float32


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, home: type, name: str) -> Iterator[list[object]]:
    calls: list[object] = []
    real = getattr(home, name)

    def note(self: object, *args: object) -> object:
        calls.append(self)
        return real(self, *args)

    monkeypatch.setattr(home, name, note)
    yield calls


def test_a_teachers_logits_are_made_once_a_block_whoever_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    back = Term("back", ReverseKL(), constant(1.0), signal="states")
    with counted(monkeypatch, Hidden, "ready") as calls:
        run(case(), WHOLE, back)
    assert len(calls) == TOKENS / BLOCK


def test_no_gradient_is_made_where_gradients_are_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    on = case()
    want = run(on, KD, CE)
    with counted(monkeypatch, RecordedLogits, "gradient") as calls, torch.no_grad():
        got = run(on, KD, CE)
    assert not calls and not got.loss.requires_grad
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)


def test_measuring_in_bfloat16_is_done_on_float32_logits() -> None:
    on = case(dtype=torch.bfloat16)
    want = run(on, KD, CE)
    with torch.no_grad():
        got = run(on, KD, CE)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    assert not (want.sums["kd"].requires_grad or want.sums["ce"].requires_grad)


def test_gradients_come_in_the_dtype_of_what_they_are_of() -> None:
    on = case(dtype=torch.bfloat16)
    weight, bias = (on.weight.detach().to(dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float32))
    head = Head(weight, bias[:, 0].detach().requires_grad_())
    chunked_terms(on.hidden, head, on.batch, (CE,), {"ce": 1.0}, NOW, BLOCK).loss.backward()
    assert head.bias is not None and on.hidden.grad is not None and weight.grad is not None and head.bias.grad is not None
    assert (on.hidden.grad.dtype, weight.grad.dtype, head.bias.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Noted:
    """Notes how many tokens it is given."""

    seen: list[int]

    reads: ClassVar[Reads] = "nothing"

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor:
        self.seen.append(len(outputs.labels))
        return outputs.label_logprobs().sum()


@dataclass(frozen=True)
class Coupled(Noted):
    """The same, and wants five at once."""

    tokens_at_once: int = 5


def test_objectives_see_pieces_of_blocks() -> None:
    noted = Noted([])
    run(case(tokens=2 * BLOCK + 1), Term("noted", noted, constant(1.0)))
    assert noted.seen == [3, 3, 2, 3, 3, 2, 1]


def test_tokens_that_see_each_other_come_in_the_number_their_objective_names() -> None:
    """However many the others would take."""
    for chunk_tokens in (1, 7, 12, 1000):
        noted, coupled = Noted([]), Coupled([])
        terms = (Term("noted", noted, constant(1.0)), Term("coupled", coupled, constant(1.0)))
        run(case(tokens=17), *terms, chunk_tokens=chunk_tokens)
        assert coupled.seen == noted.seen == [5, 5, 5, 2]


@pytest.mark.parametrize("vocabulary", [50, 4_096, 32_000, 131_072, 262_144])
def test_cuts_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
    monkeypatch.setattr(cut, "PIECE_BYTES", 4 << 20)
    found = cut_for(vocabulary, "cpu")
    assert found.block_tokens * vocabulary * 4 <= cut.BLOCK_BYTES
    assert found.piece_tokens * vocabulary * 4 <= cut.PIECE_BYTES
    assert found.block_tokens % 32 == 0
    assert cut_for(vocabulary, "cuda") == Cut(found.block_tokens, found.block_tokens)


def test_a_vocabulary_beyond_all_bytes_still_moves() -> None:
    assert cut_for(1 << 30, "cpu") == Cut(32, 1)


def test_an_objective_can_be_asked_whether_its_tokens_see_each_other() -> None:
    objective: Objective = Coupled([])
    assert isinstance(objective, cut.Together) and not isinstance(Noted([]), cut.Together)
