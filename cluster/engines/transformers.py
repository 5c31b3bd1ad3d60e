"""A Hugging Face causal language model as an engine, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from cluster.answers import answer, refuse_dropped, token_keys
from cluster.causal_lm import (
    OutputHead,
    attention_argument,
    backbone,
    bound_kernel_cache,
    compute_device,
    explained_by_rounding,
    head_deviation,
    output_head,
)
from cluster.config import TransformersEndpoint
from cluster.engines import Columns, Request, Sampling
from cluster.engines.names import refuse_names
from cluster.engines.slots import has_slots
from cluster.engines.transformers_write import write
from cluster.forwards import bundle_rows, group_by_length, lay_out


class TransformersEngine:
    """Scores rows with a frozen model: forwards of similar lengths, and logits of loss tokens only, a piece at a time."""

    def __init__(self, config: TransformersEndpoint, vocabulary: int | None = None, threads: int | None = None):
        """Loads the model. `vocabulary` is how many ids, from 0, may be named; all of the model's when absent.

        `ValueError` when quantisation is asked of a CPU or the model's head is not understood; `OSError` when there is
        no such model or it has no safetensors weights.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        bound_kernel_cache()
        self.device = compute_device()
        self.config = config
        self.model = load_frozen(config, self.device)
        self.version: int | None = None
        """Of the weights that were published last; None for those that were loaded."""
        embedding: Any = self.model.get_input_embeddings()
        self.embedded = int(embedding.weight.shape[0])
        self.predicted = len(output_head(self.model).weight)
        self.vocabulary = min(self.predicted, vocabulary or self.predicted)
        deviation = head_deviation(self.model)
        if not explained_by_rounding(deviation, self.model.dtype):
            raise ValueError(
                f"endpoint model {config.model!r}: got logits of {type(self.model).__name__} that differ by {deviation:.2g} "
                "when its output head is applied apart; expected the same. This architecture cannot be an endpoint."
            )

    @property
    def head(self) -> OutputHead:
        """What makes logits of its hidden states."""
        return output_head(self.model)

    @torch.inference_mode()
    def score(self, columns: Columns, request: Request) -> Columns:
        """See `cluster.engines.Engine.score`."""
        self._refuse_foreign(columns, request)
        rows = bundle_rows(columns)
        labels, keys = self._moved(rows.labels), self._moved(token_keys(columns, rows.loss_at))
        wanted = self._moved(columns["wanted"].astype(np.int64)) if request.kind == "among" else None
        found: dict[str, Tensor] = {}
        for group in group_by_length(rows.reach, self.config.forward_tokens):
            laid = lay_out(rows, [[r] for r in group])
            states = backbone(self.model)(input_ids=self._moved(laid.input_ids), use_cache=False).last_hidden_state
            hidden = states.flatten(0, 1).index_select(0, self._moved(laid.index))
            order = self._moved(laid.order)
            said = answer(hidden, self.head, labels[order], keys[order], request, self.vocabulary, wanted)
            for name, values in said.items():
                whole = found.setdefault(name, values.new_empty((len(labels), *values.shape[1:])))
                whole[order] = values
        return self._columns(found or self._nothing(request))

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """See `cluster.engines.Writer.write`."""
        self._refuse_unknown(columns)
        return write(self.model, columns, sampling, self.vocabulary, self.config.forward_tokens, self._has_slots)

    @torch.no_grad()
    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See `cluster.engines.Follower.publish`. Nothing else that this engine keeps is made of weights."""
        if self.config.quantization != "none":
            raise ValueError(f"endpoint quantization: got {self.config.quantization!r}; expected 'none' where weights are published")
        own = {name: values for name, values in self.model.state_dict().items() if values.is_floating_point()}
        given = {own[name].data_ptr() for name in weights if name in own}
        refuse_names("missing", (n for n, values in own.items() if values.data_ptr() not in given))
        refuse_names("unexpected", (n for n in weights if n not in own))
        refuse_names("of another shape", (n for n, values in weights.items() if values.shape != own[n].shape))
        for name, values in weights.items():
            own[name].copy_(values)
        self.version = version

    @cached_property
    def _has_slots(self) -> bool:
        return has_slots(self.model)

    def _nothing(self, request: Request) -> dict[str, Tensor]:
        """The answer about no token."""
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        hidden = torch.zeros((1, self.head.weight.shape[-1]), dtype=self.model.dtype, device=self.device)
        said = answer(hidden, self.head, none.new_zeros(1), none.new_zeros(1), request, self.vocabulary, none)
        return {name: values[:0] for name, values in said.items()}

    def _columns(self, found: dict[str, Tensor]) -> Columns:
        dropped = found.pop("dropped")
        refuse_dropped(dropped, self.config.max_dropped_mass, self.config.model)
        flat = {name: values.flatten() for name, values in found.items()}
        flat["dropped_mass"] = (dropped.max() if len(dropped) else dropped.new_zeros(()))[None].float()
        return {n: (v.view(torch.int16) if v.dtype == torch.bfloat16 else v).cpu().numpy() for n, v in flat.items()}

    def _moved(self, values: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _refuse_foreign(self, columns: Columns, request: Request) -> None:
        if request.kind == "topk" and request.top_k > self.vocabulary:
            raise ValueError(f"top_k: got {request.top_k}; expected at most the {self.vocabulary} usable ids. Lower the strategy's top_k.")
        self._refuse_unknown(columns)

    def _refuse_unknown(self, columns: Columns) -> None:
        highest = int(columns["tokens"].max()) if len(columns["tokens"]) else 0
        if highest >= self.embedded:
            raise ValueError(
                f"tokens: got the id {highest}; expected less than the {self.embedded} ids that this endpoint's model embeds. "
                "Teacher and student must share a tokenizer."
            )


def load_frozen(config: TransformersEndpoint, device: torch.device) -> PreTrainedModel:
    """The endpoint's model in evaluation mode on `device`, from safetensors only."""
    quantized = config.quantization != "none"
    if quantized and device.type == "cpu":
        raise ValueError(
            f"endpoint quantization: got {config.quantization!r} in a process without a GPU; expected 'none' there. "
            "Give the endpoint resources.gpus, or drop its quantization."
        )
    if config.follows_student:
        return _unfilled(config, device)
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model,
        revision=config.revision or "main",
        dtype=config.dtype,
        attn_implementation=attention_argument(config.attention),
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
        quantization_config=_quantization(config),
        device_map={"": device} if quantized else None,
    )
    loaded: PreTrainedModel = model if quantized else model.to(device)
    loaded.requires_grad_(False)
    loaded.eval()
    return loaded


def _unfilled(config: TransformersEndpoint, device: torch.device) -> PreTrainedModel:
    """The model of a configuration, whose weights are published later."""
    shape = AutoConfig.from_pretrained(config.model, revision=config.revision or "main", trust_remote_code=config.trust_remote_code)
    dtype = (shape.dtype or torch.float32) if config.dtype == "auto" else getattr(torch, config.dtype)
    made: Any = AutoModelForCausalLM.from_config(
        shape, dtype=dtype, attn_implementation=attention_argument(config.attention), trust_remote_code=config.trust_remote_code
    )
    made.to(device).requires_grad_(False)
    model: PreTrainedModel = made.eval()
    return model


def _quantization(config: TransformersEndpoint) -> BitsAndBytesConfig | None:
    if config.quantization == "none":
        return None
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
