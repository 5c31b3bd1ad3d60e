"""The student: loading, its head apart, micro-batches, and packed rows that never see each other."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
)

from orchestrator.config import Lora, StudentConfig
from orchestrator.errors import Refusal
from orchestrator.microbatch import MicroBatch, count_tokens, cut, dummy, pack
from orchestrator.models import (
    StudentModule,
    backbone_of,
    check_head,
    check_packing,
    fingerprint,
    head_of,
    load_config,
    load_student,
    load_tokenizer,
    usable_vocabulary,
)
from strategies.core import Columns, Progress, Term
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from tests.tiny import tiny_model, tiny_tokenizer

VOCABULARY = 96
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, final_logit_softcapping=0.2),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL, max_position_embeddings=64),
    "phi": lambda: PhiConfig(**SMALL),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16, pad_token_id=1
    ),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.0625, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=8.0),
}
TERMS = (Term("kd", ForwardKL(constant(2.0)), constant(1.0), signal="teacher"), Term("ce", CrossEntropy(), constant(1.0)))
SCALES = {"kd": 0.7, "ce": 0.3}
PROGRESS = Progress(0, 1)


def network(architecture: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), dtype=torch.float32)
        for parameter in model.parameters():  # biases start at zero, which would hide one that is forgotten
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


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
        loss, parts = module(micro, TERMS, SCALES, PROGRESS)
        loss.backward()
        sums += parts
    return sums, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def same(got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=2e-5, atol=1e-5)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-9, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_and_backbone_apart_give_the_models_own_logits(architecture: str) -> None:
    model = network(architecture)
    check_head(model)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        apart = head_of(model).logits(backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
        torch.testing.assert_close(apart, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_logits_scaled_by_the_head_multiplier_are_known() -> None:
    config = FalconH1Config(**SMALL, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=8, lm_head_multiplier=0.3)
    check_head(AutoModelForCausalLM.from_config(config))


def test_an_architecture_with_an_unknown_head_is_refused() -> None:
    model = network("granite")
    model.config.logits_scaling = None
    model.lm_head.register_forward_hook(lambda module, args, output: output / 8.0)
    with pytest.raises(Refusal, match="architecture GraniteForCausalLM: got logits that differ"):
        check_head(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_row_never_sees_another(architecture: str) -> None:
    model = network(architecture)
    check_packing(model)
    columns = bundle([9, 14, 2, 5, 20, 3, 11, 1, 8])
    packed = cut(columns, ["teacher"], "packed", micro_batch_tokens=48, max_length_tokens=24)
    assert any(m.position_ids is not None and len(m.input_ids) > 1 for m in packed), "several packed sequences in one forward"
    assert any(m.position_ids is not None and (m.position_ids[:, -1] == 0).any() for m in packed), "padding at the end of a sequence"
    alone = cut(columns, ["teacher"], "bucketed", micro_batch_tokens=1, max_length_tokens=24)
    same(learned(model, packed), learned(model, alone))


def test_recurrent_networks_are_refused_for_packing() -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Refusal, match="batching with MambaForCausalLM: got packed rows that change each other"):
        check_packing(model)


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
def test_gradients_are_those_of_the_full_logits_however_the_bundle_is_cut(micro_batch_tokens: int) -> None:
    model, columns = network("qwen3"), bundle([9, 14, 2, 5, 20, 3])
    got = learned(model, cut(columns, ["teacher"], "bucketed", micro_batch_tokens, 24))
    model.zero_grad()
    logprobs, start = [], 0
    for length in columns["lengths"].tolist():
        mask = columns["loss_mask"][start : start + length]
        ids = torch.from_numpy(columns["tokens"][start : start + length]).long()[None]
        logits = model(input_ids=ids).logits[0].double()
        logprobs.append(logits[np.flatnonzero(mask) - 1])
        start += length
    z = torch.cat(logprobs)
    labels = torch.from_numpy(columns["tokens"][columns["loss_mask"].astype(bool)]).long()
    ce = -z.log_softmax(-1).gather(-1, labels[:, None]).sum()
    torch.testing.assert_close(got[0][1], ce.float(), rtol=1e-5, atol=0)
    teacher = cut(columns, ["teacher"], "bucketed", 10_000, 24)  # only to read the signal's pairing in one order
    assert sum(m.loss_tokens for m in teacher) == len(labels)
    ids, given = (torch.from_numpy(columns[f"teacher/{n}"].reshape(len(labels), -1)) for n in ("ids", "logprobs"))
    log_q = (z / 2.0).log_softmax(-1)
    inside = log_q.gather(-1, ids.long())
    tail = torch.log1p(-inside.exp().sum(-1, keepdim=True))
    left = VOCABULARY - ids.shape[1]
    p = torch.cat([given.double() / 2.0, ((1 - given.double().exp().sum(-1, keepdim=True)) / left).log() / 2.0 + np.log(left)], -1).softmax(-1)
    kl = 4.0 * (torch.from_numpy(columns["weights/kd"])[:, None] * p * (p.log() - torch.cat([inside, tail], -1))).sum()
    torch.testing.assert_close(got[0][0], kl.float(), rtol=1e-5, atol=0)
    (0.7 * kl + 0.3 * ce).backward()
    wanted = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    same(got, (got[0], wanted))


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12), room=st.integers(1, 90), longest=st.integers(1, 60), packed=st.booleans())
def test_cutting_keeps_every_loss_token_with_its_own_columns(lengths: list[int], room: int, longest: int, packed: bool) -> None:
    columns = bundle(lengths)
    micros = cut(columns, ["teacher"], "packed" if packed else "bucketed", room, longest)
    labels = torch.from_numpy(columns["tokens"][columns["loss_mask"].astype(bool)]).long()
    got = sorted(
        (int(label), tuple(ids.tolist()), tuple(logprobs.tolist()), float(weight))
        for m in micros
        for label, ids, logprobs, weight in zip(m.labels, m.batch.signals["teacher"].ids, m.signals["teacher/logprobs"], m.weights["kd"], strict=True)
    )
    ids, logprobs = (columns[f"teacher/{n}"].reshape(len(labels), -1) if len(labels) else np.zeros((0, 5)) for n in ("ids", "logprobs"))
    wanted = sorted(
        (int(a), tuple(b.tolist()), tuple(c.tolist()), float(w)) for a, b, c, w in zip(labels, ids, logprobs, columns["weights/kd"], strict=True)
    )
    assert got == wanted
    assert all(m.padded_tokens <= room or len(m.input_ids) == 1 for m in micros)


def test_cutting_the_same_bundle_again_is_bitwise_the_same() -> None:
    first, second = (cut(bundle([9, 9, 9, 14, 2]), ["teacher"], "packed", 30, 20) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.index, b.index)
        assert torch.equal(a.signals["teacher/ids"], b.signals["teacher/ids"])


def test_packing_fills_sequences_longest_first() -> None:
    assert pack(np.asarray([3, 9, 0, 5, 7, 12]), 12) == [[5], [1, 0], [4, 3]]


def test_packing_into_one_micro_batch_of_room_makes_single_sequences() -> None:
    micros = cut(bundle([9, 14, 2, 5, 20, 3, 11, 1, 8]), ["teacher"], "packed", micro_batch_tokens=24, max_length_tokens=24)
    assert [len(m.input_ids) for m in micros] == [1] * len(micros)


def test_counts_are_loss_tokens_that_a_term_weighs() -> None:
    columns = bundle([9, 14])
    columns["weights/kd"][:4] = 0
    tokens = int(columns["loss_mask"].sum())
    assert (count_tokens(columns, "ce"), count_tokens(columns, "kd")) == (tokens, tokens - 4)


def test_a_missing_signal_is_named() -> None:
    with pytest.raises(ValueError, match="signal column 'other/ids': got a bundle with"):
        cut(bundle([9]), ["other"], "bucketed", 30, 20)


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_a_micro_batch_without_loss_tokens_gives_zero_gradients_everywhere(tmp_path: Path, lora: Lora | None) -> None:
    tiny_model(tmp_path, vocab_size=VOCABULARY)
    model = load_student(StudentConfig(model=str(tmp_path), lora=lora), gradient_checkpointing=False, seed=0)
    (real, *_) = cut(bundle([9]), ["teacher"], "bucketed", 30, 20)
    for empty in (dummy(), real.dummy()):
        sums, gradients = learned(model, [empty])
        assert not sums.any()
        assert gradients.keys() == {f"model.{n}" for n, p in model.named_parameters() if p.requires_grad}
        assert not any(g.any() for g in gradients.values())


def test_nothing_is_differentiated_when_only_measuring() -> None:
    module = StudentModule(network("llama"))
    (micro,) = cut(bundle([9, 5]), ["teacher"], "bucketed", 100, 20)
    with torch.no_grad():
        loss, sums = module(micro, TERMS, SCALES, PROGRESS)
    assert not loss.requires_grad and all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(loss, 0.7 * sums[0] + 0.3 * sums[1])


def test_bfloat16_compute_stays_close_to_float32() -> None:
    model, columns = network("qwen3"), bundle([9, 14, 20])
    micros = cut(columns, ["teacher"], "bucketed", 100, 20)
    wanted, _ = learned(model, micros)
    with torch.autocast("cpu", torch.bfloat16):
        got, gradients = learned(model, micros)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=0)
    assert {g.dtype for g in gradients.values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    tiny_model(tmp_path, vocab_size=VOCABULARY)
    micros = cut(bundle([9, 14, 20]), ["teacher"], "packed", 100, 40)
    models = [load_student(StudentConfig(model=str(tmp_path)), checkpointing, seed=0).train() for checkpointing in (True, False)]
    same(learned(models[0], micros), learned(models[1], micros))


def test_a_lora_student_trains_its_adapter_and_not_the_head(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path, vocab_size=VOCABULARY, tied=False)
    model = load_student(StudentConfig(model=str(tmp_path), lora=Lora(r=4)), gradient_checkpointing=True, seed=0)
    check_head(model)
    check_packing(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and "lm_head" not in n for n in trained)
    micros = cut(bundle([9, 14]), ["teacher"], "bucketed", 100, 20)
    sums, gradients = learned(model.train(), micros)
    assert {n.removeprefix("model.") for n in gradients} and all(torch.isfinite(g).all() for g in gradients.values())
    torch.testing.assert_close(sums, learned(plain, micros)[0], rtol=1e-4, atol=1e-4)  # a fresh adapter adds nothing


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_fresh_weights_are_the_same_on_every_rank_and_differ_by_seed(tmp_path: Path, lora: Lora | None) -> None:
    network("llama").config.save_pretrained(tmp_path)
    config = StudentConfig(model=str(tmp_path), init="random", lora=lora)
    state = torch.random.get_rng_state()
    first, again, other = (dict(load_student(config, False, seed).named_parameters()) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state()), "the process's own random state is left alone"
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_a_dtype_is_what_the_weights_get(tmp_path: Path) -> None:
    tiny_model(tmp_path, vocab_size=VOCABULARY)
    assert load_student(StudentConfig(model=str(tmp_path), dtype="bfloat16"), False, 0).dtype == torch.bfloat16
    assert load_student(StudentConfig(model=str(tmp_path), dtype="auto"), False, 0).dtype == torch.float32
    assert load_student(StudentConfig(model=str(tmp_path), dtype="bfloat16", init="random"), False, 0).dtype == torch.bfloat16


def test_a_missing_folder_is_refused() -> None:
    with pytest.raises(Refusal, match=r"model './nowhere': got no such folder"):
        load_config("./nowhere")


def test_an_unreachable_hub_is_refused() -> None:
    with pytest.raises(Refusal, match="got no such folder, and a hub that cannot be reached"):
        load_config("someone/some-model-that-is-not-cached")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"got no config\.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(Refusal, match="got a configuration that cannot be read"):
        load_config(str(tmp_path))
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="got the architecture 't5'; expected a causal language model"):
        load_config(str(tmp_path))


def test_pickled_or_missing_weights_are_refused_unless_fresh_ones_are_wanted(tmp_path: Path) -> None:
    network("llama").config.save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="got no weights"):
        load_config(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(Refusal, match="got pickled weights only"):
        load_config(str(tmp_path))
    assert load_config(str(tmp_path), weights=False).vocab_size == VOCABULARY


def test_code_of_a_models_own_needs_permission(tmp_path: Path) -> None:
    content = {"model_type": "abacus", "auto_map": {"AutoConfig": "code.Abacus", "AutoModelForCausalLM": "code.AbacusLM"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "code.py").write_text("raise RuntimeError('ran')\n")
    with pytest.raises(Refusal, match="got a model that runs code of its own; expected permission"):
        load_config(str(tmp_path))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    with pytest.raises(Refusal, match=r"Name one with student\.tokenizer"):
        load_tokenizer(StudentConfig(model=str(tmp_path)))


def test_models_that_pad_one_vocabulary_differently_share_the_smaller(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, vocab_size=300)
    assert len(load_tokenizer(StudentConfig(model="anything", tokenizer=str(tmp_path)))) == len(tokenizer)
    student, teacher, small = (LlamaConfig(vocab_size=v) for v in (304, 320, 280))
    assert usable_vocabulary(student, tokenizer, teacher) == usable_vocabulary(teacher, tokenizer, student) == 304
    with pytest.raises(Refusal, match="vocabulary of endpoint 'big': got 280 ids; expected at least the 300 ids"):
        usable_vocabulary(student, tokenizer, small, "big")


def test_a_fingerprint_follows_the_weights_and_the_configuration(tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        tiny_model(tmp_path / name, seed=seed)
    a, b, c = (fingerprint(str(tmp_path / name)) for name in "abc")
    assert a == b != c and a.startswith("sha256:")
    tiny_model(tmp_path / "b", heads=2)
    assert fingerprint(str(tmp_path / "b")) != a


def test_a_large_weight_file_is_fingerprinted_by_header_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.saved_models.WHOLE_FILE_BYTES", 1024)
    tiny_model(tmp_path)
    before, path = fingerprint(str(tmp_path)), tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    content[8 + header] ^= 1
    path.write_bytes(content)
    assert fingerprint(str(tmp_path)) != before
