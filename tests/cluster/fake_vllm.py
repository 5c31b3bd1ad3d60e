"""A stand-in for the package `vllm`: just what the engine uses of it, under vLLM's own names, on a small model in this process.

Keywords and limits are those of vLLM 0.29; one that vLLM does not know is a `TypeError` here too. `test_vllm_package.py` compares
them with the real package where that is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypedDict

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.temperature <= 2 and 0 < self.top_p <= 1 and self.top_k >= -1 and (self.max_tokens or 0) >= 1):
            raise ValueError(f"vLLM takes no such sampling parameters: {self}")


@dataclass
class FlatLogprobs:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)

    def place(self, logprobs: Tensor | None, own: int = 0, k: int = 0) -> None:
        """The token itself and the `k` best of `(V,)`; nothing for a prompt's first token."""
        self.start_indices.append(len(self.token_ids))
        if logprobs is not None:
            best = logprobs.topk(k)
            self.token_ids += [own, *best.indices.tolist()]
            self.logprobs += [float(logprobs[own]), *best.values.tolist()]
            self.ranks += [int((logprobs >= logprobs[own]).sum()), *range(1, k + 1)]
        self.end_indices.append(len(self.token_ids))


@dataclass
class CompletionOutput:
    token_ids: Sequence[int]
    logprobs: FlatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    prompt_logprobs: FlatLogprobs | None
    outputs: list[CompletionOutput]


class Model:
    """What a worker runs: hidden states, and logits of them."""

    def __init__(self, network: Any):
        self.network = network

    def __call__(self, tokens: list[int]) -> Tensor:
        states: Tensor = self.network.base_model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state
        return states[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor = self.network.get_output_embeddings()(hidden_states)
        return logits


class Runner:
    def __init__(self, model: Model):
        self.model = model

    def get_model(self) -> Model:
        return self.model


class Worker:
    def __init__(self, model: Model):
        self.model_runner = Runner(model)

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        network = self.model_runner.model.network
        assert weights_iterator is not None and weights_path is None and is_checkpoint_format
        own = dict(network.named_parameters())
        for name, value in weights_iterator:
            if network.config.tie_word_embeddings and name.startswith("lm_head."):
                continue  # as vLLM's models do
            own[name].data.copy_(value)


@dataclass
class ModelConfig:
    vocabulary: int
    max_model_len: int

    def get_vocab_size(self) -> int:
        return self.vocabulary


class LLM:
    made: Any = None
    """The last one."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        quantization: str | None = None,
        load_format: str = "auto",
        tensor_parallel_size: int = 1,
        distributed_executor_backend: str | None = None,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        max_logprobs: int = 20,
        logprobs_mode: str = "raw_logprobs",
        enable_prefix_caching: bool | None = None,
        enforce_eager: bool = False,
        generation_config: str = "auto",
        worker_extension_cls: str = "",
        seed: int = 0,
    ):
        assert skip_tokenizer_init and logprobs_mode == "raw_logprobs" and quantization is None and tensor_parallel_size == 1
        shape = AutoConfig.from_pretrained(model)
        if load_format == "dummy":
            network = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))
        else:
            network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        module, _, name = worker_extension_cls.rpartition(".")
        extended: Any = type("ExtendedWorker", (Worker, getattr(import_module(module), name)), {})
        self.worker = extended(Model(network.eval()))
        self.model_config = ModelConfig(shape.vocab_size, max_model_len or shape.max_position_embeddings)
        self.max_logprobs = shape.vocab_size if max_logprobs == -1 else max_logprobs
        self.prefixes: dict[tuple[int, ...], Tensor] | None = {} if enable_prefix_caching else None
        LLM.made = self

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        return [getattr(self.worker, method)(*args, **(kwargs or {}))]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if self.prefixes is not None:
            self.prefixes.clear()
        return True

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[TokensPrompt],
        sampling_params: Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert sampling_params is not None and len(prompts) == len(sampling_params)
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _one(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        if (
            not 0 < len(prompt) < self.model_config.max_model_len
            or max(params.prompt_logprobs or 0, params.logprobs or 0) > self.max_logprobs
        ):
            raise ValueError("vLLM takes no such request")
        model, scored = self.worker.model_runner.model, FlatLogprobs()
        if params.prompt_logprobs is not None:
            said = model.compute_logits(model(prompt)[:-1]).float().log_softmax(-1)
            scored.place(None)
            for own, row in zip(prompt[1:], said, strict=True):
                scored.place(row, own, params.prompt_logprobs)
        return RequestOutput(prompt, scored if params.prompt_logprobs is not None else None, [self._written(prompt, params)])

    def _written(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        model, tokens, told = self.worker.model_runner.model, list(prompt), FlatLogprobs()
        generator = torch.Generator().manual_seed(params.seed or 0)
        ends = params.stop_token_ids or []
        assert params.ignore_eos or params.prompt_logprobs is not None
        while True:
            logits = model.compute_logits(self._last_state(tokens, params)[None])[0].float()
            chosen = int(_choose(logits, params, generator))
            tokens.append(chosen)
            if params.logprobs is not None:
                told.place(logits.log_softmax(-1), chosen, params.logprobs)
            if chosen in ends:
                break
            if len(tokens) - len(prompt) >= (params.max_tokens or 0) or len(tokens) >= self.model_config.max_model_len:
                break
        reason = "stop" if tokens[-1] in ends else "length"
        return CompletionOutput(tokens[len(prompt) :], told if params.logprobs is not None else None, reason, None)

    def _last_state(self, tokens: list[int], params: SamplingParams) -> Tensor:
        """Kept by all the tokens before it, so that a cache that outlives its weights shows."""
        model = self.worker.model_runner.model
        if self.prefixes is None or params.prompt_logprobs is not None:
            return model(tokens)[-1]
        key = tuple(tokens)
        if key not in self.prefixes:
            self.prefixes[key] = model(tokens)[-1]
        return self.prefixes[key]


def _choose(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
    if params.temperature == 0:
        return logits.argmax()
    p, ids = (logits / params.temperature).softmax(-1).sort(descending=True)
    p = p.where(p.cumsum(-1) - p < params.top_p, 0.0)
    if params.top_k > 0:
        p[params.top_k :] = 0.0
    return ids[torch.multinomial(p / p.sum(), 1, generator=generator)]


@contextmanager
def instead_of_vllm() -> Iterator[None]:
    """`import vllm` finds the stand-in."""
    module: Any = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, TokensPrompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", module)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield
