"""A student cut out of a larger network computes with that network's own numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.config import Lora, StudentConfig
from orchestrator.errors import Refusal
from orchestrator.models import load_student
from orchestrator.plan import plan_text
from orchestrator.sketch import student_network
from orchestrator.truncate import Truncate
from tests.orchestrator.bench import Bench
from tests.orchestrator.networks import ARCHITECTURES, VOCABULARY, network
from tests.tiny import tiny_model

OUT = r"\.(o_proj|down_proj|c_proj|out_proj|fc2|dense|dense_4h_to_h)\."
"""Parameters by which attention and MLP add to what goes from layer to layer."""
ATTENTION, MLP = r"\.(o_proj|attn\.c_proj)\.weight", r"\.(down_proj|mlp\.c_proj)\.weight"


def logits(model: Any) -> Tensor:
    ids = torch.arange(2 * 9).reshape(2, 9) * 5 % VOCABULARY
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=ids, use_cache=False).logits)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder


def cut(folder: Path, **kept: Any) -> PreTrainedModel:
    found: PreTrainedModel = load_student(StudentConfig(model=str(folder), truncate=Truncate(**kept)), False, seed=3)
    return found


def silence(model: PreTrainedModel, layer: int) -> None:
    """A layer that adds nothing."""
    for name, parameter in model.named_parameters():
        if f".{layer}." in name and re.search(OUT, name):
            parameter.data.zero_()


def deafen(model: PreTrainedModel, which: str, kept: int, last_axis: bool) -> None:
    """Projections that read nothing beyond the first `kept` numbers."""
    for name, parameter in model.named_parameters():
        if re.search(which, name):
            parameter.data.narrow(1 if last_axis else 0, kept, parameter.shape[1 if last_axis else 0] - kept).zero_()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("silent", [0, 1])
def test_a_network_without_a_silent_layer_says_the_same(tmp_path: Path, architecture: str, silent: int) -> None:
    model = network(architecture)
    silence(model, silent)
    folder = saved(model, tmp_path)
    torch.testing.assert_close(logits(cut(folder)), logits(model), rtol=0, atol=0)
    student = cut(folder, layers=(1 - silent,))
    assert student.config.num_hidden_layers == 1 and student.num_parameters() < model.num_parameters()
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gpt2"])
def test_dropped_layers_leave_the_others_as_they_are(tmp_path: Path, architecture: str) -> None:
    model = network(architecture)
    folder = saved(model, tmp_path)
    student = logits(cut(folder, layers={"last": 1}))
    assert (student - logits(model)).abs().max() > 1e-3
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    del layers[0]
    model.config.num_hidden_layers = 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[1:]
    torch.testing.assert_close(student, logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2"])
def test_neurons_and_heads_that_nobody_reads_may_go(tmp_path: Path, architecture: str) -> None:
    model = network(architecture)
    deafen(model, MLP, 20, last_axis=True)
    deafen(model, ATTENTION, 16, last_axis=True)
    groups = {} if architecture == "llama" else {"key_value_heads": 1}
    student = cut(saved(model, tmp_path), intermediate_size=20, attention_heads=2, **groups)
    assert student.num_parameters() < 0.75 * model.num_parameters()
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-5, atol=1e-6)


def test_layers_side_by_side_are_cut_each(tmp_path: Path) -> None:
    """GPT-2 computes queries, keys and values at once: of 32 numbers each, 16 stay of each."""
    model = network("gpt2")
    student = cut(saved(model, tmp_path), hidden_size=16, attention_heads=2)
    whole, part = (dict(m.named_parameters()) for m in (model, student))
    for name, dropped in (("weight", slice(None, 16)), ("bias", None)):
        theirs, mine = whole[f"transformer.h.0.attn.c_attn.{name}"], part[f"transformer.h.0.attn.c_attn.{name}"]
        theirs = theirs if dropped is None else theirs[dropped]
        expected = torch.cat([theirs[..., first : first + 16] for first in (0, 32, 64)], -1)
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    torch.testing.assert_close(part["transformer.wpe.weight"], whole["transformer.wpe.weight"][:, :16], rtol=0, atol=0)
    assert logits(student).isfinite().all()


def test_the_residual_width_is_cut_and_heads_stay_as_wide(tmp_path: Path) -> None:
    model = network("llama")
    student = cut(saved(model, tmp_path), hidden_size=24)
    own = dict(student.named_parameters())
    assert own["model.layers.1.self_attn.q_proj.weight"].shape == (32, 24) and own["model.norm.weight"].shape == (24,)
    theirs = model.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(own["model.layers.1.mlp.down_proj.weight"], theirs[:24], rtol=0, atol=0)
    assert logits(student).isfinite().all()


@pytest.mark.parametrize(
    ("layers", "total", "kept"),
    [
        (None, 3, [0, 1, 2]),
        ((0, 2), 3, [0, 2]),
        ({"first": 2}, 5, [0, 1]),
        ({"last": 2}, 5, [3, 4]),
        ({"even": 3}, 9, [0, 4, 8]),
        ({"even": 4}, 6, [0, 2, 3, 5]),
        ({"even": 1}, 6, [0]),
    ],
)
def test_layers_are_counted_or_named(layers: Any, total: int, kept: list[int]) -> None:
    assert Truncate(layers=layers).kept(total) == kept
    assert all(Truncate(layers={"even": n}).kept(7) == sorted(set(Truncate(layers={"even": n}).kept(7))) for n in range(1, 8))


@pytest.mark.parametrize(
    ("architecture", "kept", "words"),
    [
        ("llama", {"layers": (0, 2)}, ["student.truncate.layers", "[0, 2]", "0 to 1"]),
        ("llama", {"layers": (1, 0)}, ["student.truncate.layers", "rising"]),
        ("llama", {"layers": {"even": 3}}, ["student.truncate.layers", "at most the 2 layers"]),
        ("llama", {"hidden_size": 64}, ["student.truncate.hidden_size", "64, for a network that has 32"]),
        ("qwen3", {"attention_heads": 2}, ["student.truncate.attention_heads", "2 of queries for each", "together"]),
        ("gpt2", {"hidden_size": 16}, ["student.truncate.hidden_size", "heads that stay 8 wide"]),
        ("gpt2", {"intermediate_size": 16}, ["student.truncate.intermediate_size", "none of its own"]),
        ("gpt_neox", {"hidden_size": 24, "attention_heads": 3}, ["student.truncate of gpt_neox", "separate linear layers"]),
    ],
)
def test_what_cannot_be_cut_is_refused_without_weights(tmp_path: Path, architecture: str, kept: Any, words: list[str]) -> None:
    folder = saved(network(architecture), tmp_path)
    with pytest.raises(Refusal) as caught:
        student_network(StudentConfig(model=str(folder), truncate=Truncate(**kept)))
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


def test_layers_that_depend_on_their_number_are_refused(tmp_path: Path) -> None:
    model = network("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(Refusal, match="scale_attn_by_inverse_layer_idx"):
        cut(saved(model, tmp_path), layers=(1,))


def test_the_sketch_is_that_of_the_cut_network_and_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    folder = saved(network("qwen3"), tmp_path)
    whole, part = (student_network(StudentConfig(model=str(folder), truncate=t)) for t in (None, Truncate(layers=(1,))))
    other = student_network(StudentConfig(model=str(folder), truncate=Truncate(layers=(0,))))
    assert part.parameters == cut(folder, layers=(1,)).num_parameters() < whole.parameters and part.layers == 1
    assert len({whole.fingerprint, part.fingerprint, other.fingerprint}) == 3


def test_fresh_weights_and_adapters_go_with_a_cut_shape(tmp_path: Path) -> None:
    folder = saved(network("qwen3"), tmp_path)
    given = StudentConfig(model=str(folder), truncate=Truncate(layers=(1,)), lora=Lora(r=2))
    adapted = load_student(given, False, seed=3)
    torch.testing.assert_close(logits(adapted), logits(cut(folder, layers=(1,))), rtol=0, atol=0)
    fresh = load_student(given.model_copy(update={"init": "random", "lora": None}), False, seed=3)
    assert fresh.config.num_hidden_layers == 1 and (logits(fresh) - logits(adapted)).abs().max() > 1e-3


def test_a_cut_student_saves_as_an_ordinary_model(tmp_path: Path) -> None:
    student = cut(saved(network("gemma2"), tmp_path / "whole"), layers=(1,))
    folder = saved(student, tmp_path / "part")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["layer_types"] == ["full_attention"]
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)


CONTROL = ("strategy=cross-entropy", "endpoints={}")


def test_the_plan_says_what_it_was_cut_out_of(bench: Bench) -> None:
    plan = bench.plan(*CONTROL, "student.truncate={layers: [1], intermediate_size: 16}")
    before = bench.plan(*CONTROL).cast.student.parameters
    said = " ".join(plan_text(plan).split())
    assert f"{plan.cast.student.parameters:,} parameters (layers 1 of 2, intermediate size 16, cut out of {before:,} parameters)" in said


def test_a_student_that_others_load_has_to_be_saved_first(bench: Bench) -> None:
    for strategy in ("gkd", "opsd"):
        with pytest.raises(Refusal, match=r"student.truncate: got a student that is cut out .* start from its exported folder"):
            bench.plan(f"strategy={{type: {strategy}, max_new_tokens: 16}}", "student.truncate={layers: [1]}")


def test_the_teacher_it_is_cut_out_of_may_teach_it(bench: Bench, tmp_path: Path) -> None:
    whole = bench.copy("teacher", "whole")
    tiny_model(whole, vocab_size=512, width=48, layers=3)
    plan = bench.plan(f"student.model={whole}", "student.truncate={layers: {even: 2}}", f"endpoints.teacher.model={whole}")
    assert plan.cast.student.layers == 2 and not any("very weights" in w for w in plan.warnings)
