"""Texts of a Hugging Face causal language model: `generate` in batches of similar prompts, with draws that belong to a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from cluster.answers import mixed_keys, uniforms
from cluster.engines import Columns, Sampling
from cluster.forwards import PAD_ID, group_by_length

Ints = NDArray[np.int64]


@torch.inference_mode()
def write(model: PreTrainedModel, columns: Columns, sampling: Sampling, usable: int, forward_tokens: int) -> Columns:
    """See `cluster.engines.Writer.write`. At most `forward_tokens` tokens are held by one batch, unless a single text needs more."""
    lengths = columns["lengths"].astype(np.int64)
    if len(lengths) and lengths.min() == 0:
        raise ValueError("prompts: got an empty one; expected at least one token to go on from")
    ends = np.cumsum(lengths)
    prompts = [columns["tokens"][end - size : end] for end, size in zip(ends, lengths, strict=True)]
    row = np.repeat(np.arange(len(lengths)), sampling.samples)
    sample = np.tile(np.arange(sampling.samples), len(lengths))
    row_id = columns["row_id"].astype(np.int64)[row]
    found: list[_Text] = [_NOTHING] * len(row)
    for group in group_by_length(lengths[row] + sampling.max_new_tokens, forward_tokens):
        choose = _Choose(sampling, usable, mixed_keys(sampling.seed, row_id[group], sample[group]))
        for number, text in zip(group, _batch(model, [prompts[row[n]] for n in group], choose), strict=True):
            found[number] = text
    return {
        "tokens": np.concatenate([_NOTHING.tokens, *(t.tokens for t in found)]),
        "lengths": np.asarray([len(t.tokens) for t in found], dtype=np.int32),
        "row_id": row_id,
        "sample": sample.astype(np.int32),
        "finished": np.asarray([t.finished for t in found], dtype=np.uint8),
        "logprobs": np.concatenate([_NOTHING.logprobs, *(t.logprobs for t in found)]),
    }


@dataclass(frozen=True)
class _Text:
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finished: bool


_NOTHING = _Text(np.zeros(0, np.int32), np.zeros(0, np.float32), False)


@dataclass
class _Choose(LogitsProcessor):
    """Chooses every next token itself, so that `generate` has one candidate left; keeps its log-probability at temperature 1."""

    sampling: Sampling
    usable: int
    keys: Ints
    """`(B,)` seeds of the texts."""
    logprobs: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        known = scores[:, : self.usable].float().log_softmax(-1)
        chosen = known.argmax(-1, keepdim=True) if self.sampling.temperature == 0 else self._drawn(known)
        self.logprobs.append(known.gather(-1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _drawn(self, known: Tensor) -> Tensor:
        """`(B, 1)` ids, by one number in [0, 1) for each text and place."""
        probabilities = (known / self.sampling.temperature).softmax(-1).double()
        ids = None
        if self.sampling.top_k or self.sampling.top_p < 1:
            probabilities, ids = probabilities.sort(dim=-1, descending=True, stable=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.sampling.top_p, 0.0)
            if self.sampling.top_k:
                probabilities[:, self.sampling.top_k :] = 0.0
        ladder = probabilities.cumsum(-1)
        place = np.full(len(self.keys), len(self.logprobs), dtype=np.int64)
        height = torch.from_numpy(uniforms(mixed_keys(0, self.keys, place), 1)).to(ladder.device) * ladder[:, -1:]
        at = torch.searchsorted(ladder, height, right=True).clamp_max(known.shape[-1] - 1)
        return at if ids is None else ids.gather(-1, at)


def _batch(model: PreTrainedModel, prompts: list[NDArray[Any]], choose: _Choose) -> list[_Text]:
    """The texts of one batch, padded on the left."""
    width = max(len(p) for p in prompts)
    ids = np.full((len(prompts), width), PAD_ID, dtype=np.int64)
    mask = np.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = prompt
        mask[b, width - len(prompt) :] = 1
    stop = choose.sampling.stop
    # the model's own settings, such as a repetition penalty, must not enter
    model.generation_config = GenerationConfig(eos_token_id=list(stop) or None, pad_token_id=stop[0] if stop else PAD_ID)
    whole: Any = model.generate(
        input_ids=torch.from_numpy(ids).to(model.device),
        attention_mask=torch.from_numpy(mask).to(model.device),
        logits_processor=LogitsProcessorList([choose]),
        max_new_tokens=choose.sampling.max_new_tokens,
        do_sample=False,
    )
    tokens = whole[:, width:].cpu().numpy().astype(np.int32)
    logprobs = torch.stack(choose.logprobs, dim=-1).cpu().numpy()
    return [_until_stop(*pair, stop) for pair in zip(tokens, logprobs, strict=True)]


def _until_stop(tokens: NDArray[np.int32], logprobs: NDArray[np.float32], stop: tuple[int, ...]) -> _Text:
    """What was written before padding."""
    ends = np.flatnonzero(np.isin(tokens, stop))
    size = int(ends[0]) + 1 if len(ends) else len(tokens)
    return _Text(tokens[:size], logprobs[:size].astype(np.float32), bool(len(ends)))
