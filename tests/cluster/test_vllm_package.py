"""The vllm engine with the real package, where that is installed: its names are the stand-in's, and what it says and writes on a GPU
is what the transformers engine does, up to bfloat16."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cluster.config import TransformersEndpoint, VllmEndpoint
from cluster.endpoints import check_scores, check_written
from cluster.engines.transformers import TransformersEngine
from cluster.engines.vllm import VllmEngine
from strategies.core import Sampling, ScoreRequest
from tests.cluster import fake_vllm
from tests.cluster.test_engines import bundle as rows_of
from tests.cluster.test_writers import PROMPTS, bundle, texts

VOCABULARY, USABLE = 256, 200
CLOSE = 0.05
"""Nats, between two ways to compute in bfloat16."""


def on_a_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.slow(test))


def save(folder: Path, seed: int) -> Path:
    """Sure enough of its tokens that rounding seldom changes the likeliest."""
    shape = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("vllm") / "old", seed=3)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    pytest.importorskip("vllm")
    settings = {"max_logprobs": -1, "max_dropped_mass": 1.0, "gpu_memory_utilization": 0.3, "enforce_eager": True}
    yield VllmEngine(VllmEndpoint(engine="vllm", model=str(folder), rows_at_once=16, **settings), USABLE)


def reference(folder: Path) -> TransformersEngine:
    return TransformersEngine(TransformersEndpoint(model=str(folder), max_dropped_mass=1.0), USABLE)


def check_same(engine: VllmEngine, expected: TransformersEngine) -> None:
    """Scores of every kind; and each likeliest text, scored by the other engine, is as likely as it said."""
    columns = rows_of([9, 30, 1, 0, 17, 2, 12], vocabulary=USABLE)
    for request in (ScoreRequest("topk", top_k=7), ScoreRequest("dense"), ScoreRequest("per-token")):
        found, wanted = engine.score(columns, request), expected.score(columns, request)
        check_scores(columns, found, request, USABLE)
        for name in {"logprob", "logprobs", "dense"} & set(found):
            # unlikely ids are far in the logits, where bfloat16 is coarse
            near = wanted[name] > -10
            np.testing.assert_allclose(found[name][near], wanted[name][near], atol=CLOSE, err_msg=f"{request.kind} {name}")


@on_a_gpu
@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=8, stop=(2,)), Sampling(max_new_tokens=8, temperature=1.0, top_k=9, samples=3)]
)
def test_written_texts_are_as_likely_as_they_say(engine: VllmEngine, folder: Path, sampling: Sampling) -> None:
    written = engine.write(bundle(PROMPTS, limits=[4, 12, 3, 9, 12]), sampling)
    check_written(bundle(PROMPTS), written, sampling.samples, USABLE)
    prompts = [PROMPTS[n // sampling.samples] for n in range(len(written["lengths"]))]
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts(written), strict=True)]
    columns = bundle(rows)
    columns["loss_mask"] = np.concatenate([np.arange(len(r)) >= len(p) for r, p in zip(rows, prompts, strict=True)]).astype(np.uint8)
    said = reference(folder).score(columns, ScoreRequest("per-token"))["logprob"]
    np.testing.assert_allclose(written["logprobs"], said, atol=CLOSE)


@on_a_gpu
def test_a_text_belongs_to_its_row_and_sample(engine: VllmEngine) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=1.0, samples=3)
    whole, again = engine.write(bundle(PROMPTS), sampling), engine.write(bundle(PROMPTS), sampling)
    assert texts(whole) == texts(again) and len({tuple(t) for t in texts(whole)}) > 10
    part = engine.write(bundle([PROMPTS[3], PROMPTS[1]], [3, 1]), sampling)
    same = [a == b for a, b in zip(texts(part), texts(whole)[9:12] + texts(whole)[3:6], strict=True)]
    assert sum(same) >= 5  # batches of another shape round otherwise


@on_a_gpu
def test_scores_are_the_transformers_engines_before_and_after_a_publication(engine: VllmEngine, folder: Path, tmp_path: Path) -> None:
    check_same(engine, reference(folder))
    new = save(tmp_path / "new", seed=4)
    engine.publish(AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32).state_dict(), 1)
    check_same(engine, reference(new))
    engine.publish(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict(), 2)
    check_same(engine, reference(folder))


def keywords(of: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(of).parameters) - {"self", "args", "kwargs"}


def test_the_stand_in_has_vllms_own_names() -> None:
    vllm = pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert keywords(fake_vllm.LLM.__init__) <= keywords(EngineArgs) | keywords(vllm.LLM.__init__)
    for name in ("collective_rpc", "generate", "reset_prefix_cache"):
        assert keywords(getattr(fake_vllm.LLM, name)) <= keywords(getattr(vllm.LLM, name)), name
    assert keywords(fake_vllm.Worker.reload_weights) <= keywords(GPUModelRunner.reload_weights)
    assert keywords(fake_vllm.SamplingParams) <= keywords(vllm.SamplingParams)
    assert set(typing.get_type_hints(fake_vllm.TokensPrompt)) <= set(typing.get_type_hints(vllm.TokensPrompt))
    assert keywords(fake_vllm.RequestOutput) <= keywords(RequestOutput)
    assert keywords(fake_vllm.CompletionOutput) <= keywords(CompletionOutput)
    assert keywords(fake_vllm.FlatLogprobs) <= keywords(FlatLogprobs)
