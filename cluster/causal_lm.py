"""A Hugging Face causal language model taken apart: the backbone that makes hidden states, and the head after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to the output layer's numbers: `cap * tanh(factor * z / cap)`."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        scaled = raw if self.factor == 1.0 else raw * self.factor
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


@dataclass(frozen=True)
class OutputHead:
    """The last layer: `transform(hidden @ weight.T + bias)`."""

    weight: nn.Parameter
    """`(V, D)`; the input embedding itself when tied."""
    bias: nn.Parameter | None
    transform: LogitTransform | None

    def logits(self, hidden: Tensor) -> Tensor:
        """`(N, V)` float32 logits of `(N, D)` hidden states."""
        raw = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        return raw if self.transform is None else self.transform(raw)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part whose output has `last_hidden_state`, `(B, L, D)`, ready for the head."""
    part: nn.Module = model.base_model
    return part


def input_embeddings(model: PreTrainedModel) -> Tensor:
    """The table of a network's input embeddings, `(V, W)`."""
    table: Any = model.get_input_embeddings()
    weight: Tensor = table.weight
    return weight


def output_head(model: PreTrainedModel) -> OutputHead:
    """`ValueError` for a model without an output layer. Ask anew in every forward: sharding replaces parameters."""
    layer: Any = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(model).__name__}: got a model without an output layer; expected a causal language model")
    return OutputHead(layer.weight, getattr(layer, "bias", None), logit_transform(model))


def logit_transform(model: PreTrainedModel) -> LogitTransform | None:
    """Scaling or soft-capping of logits as the architecture declares it; None for the plain ones."""
    config = model.config.get_text_config()
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    found = LogitTransform(_factor(model, config), next((float(c) for c in caps if c), None))
    return None if found == LogitTransform() else found


def _factor(model: PreTrainedModel, config: PreTrainedConfig) -> float:
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:  # the Granite family divides by it
        return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
    given = getattr(model, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    return 1.0 if given is None else float(given)


def vocabulary_rows(config: PreTrainedConfig) -> int:
    """Ids a model of this configuration embeds and predicts, padding of its vocabulary included."""
    return int(config.get_text_config().vocab_size)


def attention_argument(attention: str) -> str | None:
    """What `from_pretrained` is told. None is SDPA, or eager for the few architectures that lack SDPA, such as Gemma 2."""
    return None if attention == "sdpa" else attention


def bound_kernel_cache() -> None:
    """Keeps oneDNN from holding a compiled kernel for each of a thousand shapes; call it before the first forward.

    Rows of uneven length make a new shape in almost every step, and in bfloat16 each cached kernel holds megabytes.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def compute_device() -> torch.device:
    """The GPU this process was given, else the CPU. A process that Ray gave none sees those of others all the same."""
    return torch.device("cuda" if torch.cuda.is_available() and not _without_gpu() else "cpu")


def _without_gpu() -> bool:
    """Whether Ray started this process and gave it no GPU; a driver takes what it finds."""
    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    started = context.get_actor_id() is not None or context.get_task_id() is not None
    return started and not context.get_accelerator_ids().get("GPU")


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; flash attention, which needs a GPU, is replaced by SDPA meanwhile."""
    training, attention = model.training, model.config._attn_implementation
    flash = str(attention).startswith("flash")
    if flash:
        model.set_attn_implementation("sdpa")
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)
    if flash:
        model.set_attn_implementation(attention)


def head_deviation(model: PreTrainedModel) -> float:
    """Largest difference between the model's own logits and those of backbone and head apart, on 8 tokens, over the
    largest logit."""
    ids = torch.arange(8, device=model.device)[None] % vocabulary_rows(model.config)
    with probing(model):
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        apart = output_head(model).logits(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
    return relative_difference(apart, own)


def packing_deviation(model: PreTrainedModel) -> float:
    """Largest change of a row's hidden states by another row before it in the same sequence, told apart by position ids
    alone, over the largest hidden state. Rows have 8 tokens."""
    ids = (torch.arange(16, device=model.device) * 7 + 3)[None] % vocabulary_rows(model.config)
    position_ids = torch.arange(16, device=model.device)[None] % 8
    core = backbone(model)
    with probing(model):
        together = core(input_ids=ids, position_ids=position_ids, use_cache=False).last_hidden_state[0, 8:]
        alone = core(input_ids=ids[:, 8:], use_cache=False).last_hidden_state[0]
    return relative_difference(together.float(), alone.float())


def explained_by_rounding(deviation: float, dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` explain such a relative difference; a NaN is never explained."""
    return deviation <= (1e-4 if dtype.itemsize >= 4 else 0.05)


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
