"""A Hugging Face causal language model as an engine, on a CPU or a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from cluster.causal_lm import (
    attention_argument,
    backbone,
    bound_kernel_cache,
    compute_device,
    explained_by_rounding,
    head_deviation,
    output_head,
)
from cluster.config import TransformersEndpoint
from cluster.engines import Columns
from cluster.forwards import bundle_rows, group_by_length, lay_out

LOGITS_AT_ONCE = 1 << 20
"""Logits that exist at one time on a CPU: 4 MiB of float32 stay near the cores. A GPU gets 64 times as many."""

TOPK_SHARE = 64
"""torch's `topk` on a CPU sorts partially while k is at most this fraction of a row."""


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
        self.forward_tokens = config.forward_tokens
        self.model = load_frozen(config, self.device)
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

    @torch.inference_mode()
    def score(self, columns: Columns, top_k: int) -> Columns:
        """See `cluster.engines.Engine.score`."""
        self._refuse_foreign(columns, top_k)
        rows = bundle_rows(columns)
        tokens = len(rows.loss_at)
        ids = torch.empty((tokens, top_k), dtype=torch.int32, device=self.device)
        logprobs = torch.empty((tokens, top_k), dtype=torch.float32, device=self.device)
        logprob = torch.empty(tokens, dtype=torch.float32, device=self.device)
        dropped = torch.zeros((), device=self.device)
        labels = self._moved(rows.labels)
        for group in group_by_length(rows.reach, self.forward_tokens):
            laid = lay_out(rows, [[r] for r in group])
            states = backbone(self.model)(input_ids=self._moved(laid.input_ids), use_cache=False).last_hidden_state
            hidden = states.flatten(0, 1).index_select(0, self._moved(laid.index))
            order = self._moved(laid.order)
            step = self._piece_tokens()
            for piece, where in zip(hidden.split(step), order.split(step), strict=True):
                logits, normaliser, lost = self._usable_logits(piece)
                best, best_ids = largest(logits, top_k)
                ids[where] = best_ids.int()
                logprobs[where] = best - normaliser
                logprob[where] = self._own(logits, normaliser, labels[where])
                dropped = torch.maximum(dropped, lost)
        found = {"ids": ids.flatten(), "logprobs": logprobs.flatten(), "logprob": logprob, "dropped_mass": dropped[None]}
        return {name: values.cpu().numpy() for name, values in found.items()}

    def _usable_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the usable ids `(n, U)`, their `logsumexp` `(n, 1)`, and the largest share of mass beyond them."""
        logits = output_head(self.model).logits(hidden)
        if self.vocabulary == self.predicted:
            return logits, logits.logsumexp(-1, keepdim=True), logits.new_zeros(())
        usable = logits[:, : self.vocabulary]
        normaliser = usable.logsumexp(-1, keepdim=True)
        return usable, normaliser, -torch.expm1(normaliser - logits.logsumexp(-1, keepdim=True)).min().clamp_max(0.0)

    def _own(self, logits: Tensor, normaliser: Tensor, labels: Tensor) -> Tensor:
        inside = labels < self.vocabulary
        own = (logits.gather(-1, labels.clamp_max(self.vocabulary - 1)[:, None]) - normaliser)[:, 0]
        return torch.where(inside, own, -torch.inf)

    def _piece_tokens(self) -> int:
        room = LOGITS_AT_ONCE if self.device.type == "cpu" else 64 * LOGITS_AT_ONCE
        return max(64, room // self.predicted)

    def _moved(self, values: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _refuse_foreign(self, columns: Columns, top_k: int) -> None:
        if top_k > self.vocabulary:
            raise ValueError(f"top_k: got {top_k}; expected at most the {self.vocabulary} usable ids. Lower the strategy's top_k.")
        highest = int(columns["tokens"].max()) if len(columns["tokens"]) else 0
        if highest >= self.embedded:
            raise ValueError(
                f"tokens: got the id {highest}; expected less than the {self.embedded} ids that this endpoint's model embeds. "
                "Teacher and student must share a tokenizer."
            )


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `(n, V)`, falling, and their places, both `(n, k)`.

    On a CPU torch partitions only when k is small against V; elsewhere numpy's partition takes half its time.
    """
    if values.device.type != "cpu" or k * TOPK_SHARE <= values.shape[-1]:
        return torch.topk(values, k)
    kept = values.shape[-1] - k
    places = torch.from_numpy(np.argpartition(values.numpy(), min(kept, values.shape[-1] - 1), axis=-1)[:, kept:])
    found, order = values.gather(-1, places).sort(-1, descending=True)
    return found, places.gather(-1, order)


def load_frozen(config: TransformersEndpoint, device: torch.device) -> PreTrainedModel:
    """The endpoint's model in evaluation mode on `device`, from safetensors only."""
    quantized = config.quantization != "none"
    if quantized and device.type == "cpu":
        raise ValueError(
            f"endpoint quantization: got {config.quantization!r} in a process without a GPU; expected 'none' there. "
            "Give the endpoint resources.gpus, or drop its quantization."
        )
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


def _quantization(config: TransformersEndpoint) -> BitsAndBytesConfig | None:
    if config.quantization == "none":
        return None
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
