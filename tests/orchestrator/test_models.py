"""The student: loading, its head apart from its backbone, and what is refused at the door."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    T5Config,
)

from orchestrator.config import Lora, StudentConfig
from orchestrator.errors import Refusal
from orchestrator.models import (
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
from tests.orchestrator.networks import ARCHITECTURES, SMALL, VOCABULARY, network
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_and_backbone_apart_give_the_models_own_logits(architecture: str) -> None:
    model = network(architecture)
    check_head(model)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        apart = head_of(model).logits(backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
        torch.testing.assert_close(apart, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_logits_scaled_by_the_head_multiplier_are_known() -> None:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
    check_head(AutoModelForCausalLM.from_config(FalconH1Config(**SMALL, **mamba, num_key_value_heads=2, lm_head_multiplier=0.3)))


def test_an_architecture_with_an_unknown_head_is_refused() -> None:
    model = network("granite")
    model.lm_head.register_forward_hook(lambda module, args, output: output / 2.0)
    with pytest.raises(Refusal, match="architecture GraniteForCausalLM: got logits that differ"):
        check_head(model)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4), "MambaForCausalLM"),
        (ARCHITECTURES["opt"], "OPTForCausalLM"),  # it makes its mask without the position ids
    ],
)
def test_networks_whose_packed_rows_would_see_each_other_are_refused(config: Callable[[], PreTrainedConfig], name: str) -> None:
    with pytest.raises(Refusal, match=f"batching with {name}: got packed rows that change each other"):
        check_packing(AutoModelForCausalLM.from_config(config()))


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
