"""Micro-batches: every way of cutting a bundle teaches the same, and packed rows never see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from orchestrator.config import Lora, StudentConfig
from orchestrator.microbatch import MicroBatch, count_tokens, cut, dummy, pack
from orchestrator.models import StudentModule, check_head, check_packing, load_student
from orchestrator.teachers import Teachers
from strategies.core import Columns, Progress, Term
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from strategies.sources import TakeTopK, Taught
from tests.orchestrator.networks import ARCHITECTURES, VOCABULARY, network
from tests.tiny import tiny_model

TERMS = (Term("kd", ForwardKL(temperature=2.0), constant(1.0), signal="teacher"), Term("ce", CrossEntropy(), constant(1.0)))
TEACHER = ("teacher/ids", "teacher/logprobs")
TEACHERS = Teachers({"teacher": Taught(TakeTopK(top_k=5), endpoint="teacher")})
SCALES = {"kd": 0.7, "ce": 0.3}
PROGRESS = Progress(0, 1)


def bundle(lengths: list[int], seed: int = 0, top_k: int = 5) -> Columns:
    """Random rows with uneven masks, a random teacher and random weights on one term."""
    rng = np.random.default_rng(seed)
    mask = (rng.random(sum(lengths)) < 0.6).astype(np.uint8)
    ends = np.cumsum(lengths)
    mask[[e - n for e, n in zip(ends, lengths, strict=True) if n]] = 0
    tokens = int(mask.sum())
    logits = np.sort(rng.standard_normal((tokens, VOCABULARY)), axis=-1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.stack([rng.permutation(VOCABULARY)[:top_k] for _ in range(tokens)]) if tokens else np.zeros((0, top_k))
    return {
        "tokens": rng.integers(0, VOCABULARY, sum(lengths)).astype(np.int32),
        "lengths": np.asarray(lengths, dtype=np.int32),
        "loss_mask": mask,
        "teacher/ids": ids.astype(np.int32).ravel(),
        "teacher/logprobs": logprobs[:, :top_k].astype(np.float32).ravel(),
        "weights/kd": rng.random(tokens).astype(np.float32),
    }


def learned(model: torch.nn.Module, micros: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums of the terms over all micro-batches, and the gradients of their scaled sum."""
    module = StudentModule(model, chunk_tokens=7)
    module.zero_grad()
    sums = torch.zeros(len(TERMS))
    for micro in micros:
        loss, parts, _ = module(TEACHERS.teach(micro, TERMS), TERMS, SCALES, PROGRESS)
        loss.backward()
        sums += parts
    return sums, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def naive_sums(model: PreTrainedModel, columns: Columns) -> tuple[Tensor, Tensor]:
    """The two terms written out in float64 from all logits of every row alone."""
    pieces, start = [], 0
    for length in columns["lengths"].tolist():
        here = slice(start, start + length)
        start += length
        logits = model(input_ids=torch.from_numpy(columns["tokens"][here]).long()[None]).logits[0].double()
        pieces.append(logits[np.flatnonzero(columns["loss_mask"][here]) - 1])
    z = torch.cat(pieces)
    labels = torch.from_numpy(columns["tokens"][columns["loss_mask"].astype(bool)]).long()
    ce = -z.log_softmax(-1).gather(-1, labels[:, None]).sum()
    ids, given = (torch.from_numpy(columns[f"teacher/{n}"].reshape(len(labels), -1)) for n in ("ids", "logprobs"))
    left = VOCABULARY - ids.shape[1]
    inside = (z / 2.0).log_softmax(-1).gather(-1, ids.long())
    log_q = torch.cat([inside, torch.log1p(-inside.exp().sum(-1, keepdim=True))], -1)
    tail = ((1 - given.double().exp().sum(-1, keepdim=True)) / left).log() / 2.0 + np.log(left)
    p = torch.cat([given.double() / 2.0, tail], -1).softmax(-1)
    kl = 4.0 * (torch.from_numpy(columns["weights/kd"])[:, None] * p * (p.log() - log_q)).sum()
    return kl, ce


def same(got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=2e-5, atol=1e-5)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-9, msg=name)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "opt"])
def test_a_packed_row_never_sees_another(architecture: str) -> None:
    model = network(architecture)
    check_packing(model)
    columns = bundle([9, 14, 2, 5, 20, 3, 11, 1, 8])
    packed = cut(columns, TEACHER, "packed", micro_batch_tokens=48, max_length_tokens=24)
    assert any(m.position_ids is not None and len(m.input_ids) > 1 for m in packed), "several packed sequences in one forward"
    assert any(m.position_ids is not None and (m.position_ids[:, -1] == 0).any() for m in packed), "padding at the end of a sequence"
    alone = cut(columns, TEACHER, "bucketed", micro_batch_tokens=1, max_length_tokens=24)
    same(learned(model, packed), learned(model, alone))


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
def test_gradients_are_those_of_the_full_logits_however_the_bundle_is_cut(micro_batch_tokens: int) -> None:
    model, columns = network("qwen3"), bundle([9, 14, 2, 5, 20, 3])
    got = learned(model, cut(columns, TEACHER, "bucketed", micro_batch_tokens, 24))
    model.zero_grad()
    kl, ce = naive_sums(model, columns)
    torch.testing.assert_close(got[0], torch.stack([kl, ce]).float().detach(), rtol=1e-5, atol=0)
    (SCALES["kd"] * kl + SCALES["ce"] * ce).backward()
    same(got, (got[0], {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    room=st.integers(1, 90),
    longest=st.integers(1, 60),
    batching=st.sampled_from(["bucketed", "packed"]),
)
def test_cutting_keeps_every_loss_token_with_its_own_columns(
    lengths: list[int], room: int, longest: int, batching: Literal["bucketed", "packed"]
) -> None:
    columns = bundle(lengths)
    micros = cut(columns, TEACHER, batching, room, longest)
    tokens = int(columns["loss_mask"].sum())
    shape = (tokens, -1) if tokens else (0, 1)
    ids, logprobs = (columns[f"teacher/{n}"].reshape(shape) for n in ("ids", "logprobs"))
    wanted = carried(columns["tokens"][columns["loss_mask"].astype(bool)], ids, logprobs, columns["weights/kd"])
    got = [row for m in micros for row in carried(m.labels, m.columns["teacher/ids"], m.columns["teacher/logprobs"], m.weights["kd"])]
    assert sorted(got) == sorted(wanted)
    assert all(m.padded_tokens <= room or len(m.input_ids) == 1 for m in micros)


def carried(*columns: Any) -> list[tuple[Any, ...]]:
    """One comparable tuple for every loss token."""
    return list(zip(*(map(str, column.tolist()) for column in columns), strict=True))


def test_cutting_the_same_bundle_again_is_bitwise_the_same() -> None:
    first, second = (cut(bundle([9, 9, 9, 14, 2]), TEACHER, "packed", 30, 20) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.index, b.index)
        assert torch.equal(a.columns["teacher/ids"], b.columns["teacher/ids"])


def test_packing_fills_sequences_longest_first() -> None:
    assert pack(np.asarray([3, 9, 0, 5, 7, 12]), 12) == [[5], [1, 0], [4, 3]]


def test_packing_into_one_micro_batch_of_room_makes_single_sequences() -> None:
    micros = cut(bundle([9, 14, 2, 5, 20, 3, 11, 1, 8]), TEACHER, "packed", micro_batch_tokens=24, max_length_tokens=24)
    assert [len(m.input_ids) for m in micros] == [1] * len(micros)


def test_counts_are_loss_tokens_that_a_term_weighs() -> None:
    columns = bundle([9, 14])
    columns["weights/kd"][:4] = 0
    tokens = int(columns["loss_mask"].sum())
    assert (count_tokens(columns, "ce"), count_tokens(columns, "kd")) == (tokens, tokens - 4)


def test_a_missing_signal_is_named() -> None:
    with pytest.raises(ValueError, match="signal column 'other/ids': got a bundle with"):
        cut(bundle([9]), ["other/ids"], "bucketed", 30, 20)


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_a_micro_batch_without_loss_tokens_gives_zero_gradients_everywhere(tmp_path: Path, lora: Lora | None) -> None:
    tiny_model(tmp_path, vocab_size=VOCABULARY)
    model = load_student(StudentConfig(model=str(tmp_path), lora=lora), gradient_checkpointing=False, seed=0)
    (real, *_) = cut(bundle([9]), TEACHER, "bucketed", 30, 20)
    for empty in (dummy(), real.dummy()):
        sums, gradients = learned(model, [empty])
        assert not sums.any()
        assert gradients.keys() == {f"model.{n}" for n, p in model.named_parameters() if p.requires_grad}
        assert not any(g.any() for g in gradients.values())


def test_nothing_is_differentiated_when_only_measuring() -> None:
    module = StudentModule(network("llama"))
    (micro,) = cut(bundle([9, 5]), TEACHER, "bucketed", 100, 20)
    with torch.no_grad():
        loss, sums, _ = module(TEACHERS.teach(micro, TERMS), TERMS, SCALES, PROGRESS)
    assert not loss.requires_grad and all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(loss, 0.7 * sums[0] + 0.3 * sums[1])


def test_bfloat16_compute_stays_close_to_float32() -> None:
    model, columns = network("qwen3"), bundle([9, 14, 20])
    micros = cut(columns, TEACHER, "bucketed", 100, 20)
    wanted, _ = learned(model, micros)
    with torch.autocast("cpu", torch.bfloat16):
        got, gradients = learned(model, micros)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=0)
    assert {g.dtype for g in gradients.values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    tiny_model(tmp_path, vocab_size=VOCABULARY)
    micros = cut(bundle([9, 14, 20]), TEACHER, "packed", 100, 40)
    models = [load_student(StudentConfig(model=str(tmp_path)), checkpointing, seed=0).train() for checkpointing in (True, False)]
    same(learned(models[0], micros), learned(models[1], micros))


def test_a_lora_student_trains_its_adapter_and_not_the_head(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path, vocab_size=VOCABULARY, tied=False)
    model = load_student(StudentConfig(model=str(tmp_path), lora=Lora(r=4)), gradient_checkpointing=True, seed=0)
    check_head(model)
    check_packing(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and "lm_head" not in n for n in trained)
    micros = cut(bundle([9, 14]), TEACHER, "bucketed", 100, 20)
    sums, gradients = learned(model.train(), micros)
    assert {n.removeprefix("model.") for n in gradients} and all(torch.isfinite(g).all() for g in gradients.values())
    torch.testing.assert_close(sums, learned(plain, micros)[0], rtol=1e-4, atol=1e-4)  # a fresh adapter adds nothing
