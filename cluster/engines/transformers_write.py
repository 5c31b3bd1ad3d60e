"""Texts of a Hugging Face causal language model, with draws that belong to a text: in slots, or by `generate` where slots cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from cluster.answers import mixed_keys, uniforms
from cluster.engines import Columns, Sampling
from cluster.engines.slots import Choose, network, write_in_slots
from cluster.engines.texts import NOTHING, Text, asked_texts
from cluster.forwards import PAD_ID, Ints, group_by_length

NUCLEUS = 64
"""Likeliest ids among which `top_p` is looked for first; eight times as many each time that they hold too little."""


@torch.inference_mode()
def write(model: PreTrainedModel, columns: Columns, sampling: Sampling, usable: int, forward_tokens: int, in_slots: bool) -> Columns:
    """See `cluster.engines.Writer.write`. Prompts and texts of at most `forward_tokens` tokens, padding included, are held at a time,
    unless a single text needs more. `in_slots` is what `cluster.engines.slots.has_slots` says of the model."""
    asked = asked_texts(columns, sampling)
    way = _in_slots if in_slots else _in_batches
    return asked.columns(way(model, asked.prompts, asked.limits, _Draws(sampling, usable, asked.keys), forward_tokens))


@dataclass(frozen=True)
class _Draws:
    """Chooses the next tokens of texts, by one number in [0, 1) for each text and place."""

    sampling: Sampling
    usable: int
    keys: Ints
    """`(T,)` seeds of all texts."""

    def __call__(self, logits: Tensor, texts: Ints, places: Ints) -> tuple[Tensor, Tensor]:
        """See `cluster.engines.slots.Choose`."""
        known = logits[:, : self.usable].float().log_softmax(-1)
        chosen = known.argmax(-1, keepdim=True) if self.sampling.temperature == 0 else self._drawn(known, self.keys[texts], places)
        return chosen[:, 0], known.gather(-1, chosen)[:, 0]

    def _drawn(self, known: Tensor, keys: Ints, places: Ints) -> Tensor:
        """`(n, 1)` ids."""
        probabilities = known.exp() if self.sampling.temperature == 1 else (known / self.sampling.temperature).softmax(-1)
        ids = None
        if self.sampling.top_k or self.sampling.top_p < 1:
            probabilities, ids = _likeliest(probabilities, self.sampling.top_k or self.usable, self.sampling.top_p)
        ladder = probabilities.cumsum(-1, dtype=torch.float64)
        height = torch.from_numpy(uniforms(mixed_keys(0, keys, places), 1)).to(ladder.device) * ladder[:, -1:]
        at = torch.searchsorted(ladder, height, right=True).clamp_max(ladder.shape[-1] - 1)
        return at if ids is None else ids.gather(-1, at)


def _likeliest(probabilities: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Falling probabilities of the `top_k` likeliest ids of each row and those ids, both `(n, w)`: 0 from where those before hold
    `top_p`. w is as small as that allows, because sorting all ids may take longer than the network."""
    most = min(top_k, probabilities.shape[-1])
    width = most if top_p >= 1 else min(most, NUCLEUS)
    while True:
        best, ids = probabilities.topk(width)
        within = best.cumsum(-1, dtype=torch.float64)
        if width == most or float(within[:, -1].min()) >= top_p:
            return best.masked_fill(within - best >= top_p, 0.0), ids
        width = min(most, 8 * width)


def _in_slots(model: PreTrainedModel, prompts: Sequence[NDArray[Any]], limits: Ints, draws: _Draws, forward_tokens: int) -> list[Text]:
    """Texts of similar widths in as many slots as the widest leaves room for."""
    found = [NOTHING] * len(prompts)
    for numbers in _similar(np.asarray([len(p) for p in prompts], dtype=np.int64) + draws.sampling.max_new_tokens):
        group, most = [prompts[n] for n in numbers], limits[numbers]
        room = max(len(p) + int(limit) for p, limit in zip(group, most, strict=True))
        slots = min(len(group), max(1, forward_tokens // room))
        choose = replace(draws, keys=draws.keys[numbers])
        texts = write_in_slots(network(model, slots, room), group, most, draws.sampling.stop, choose)
        for number, text in zip(numbers, texts, strict=True):
            found[number] = text
    return found


def _similar(widths: Ints) -> list[Ints]:
    """Numbers of the widest and all that are more than half as wide, then of the widest of the rest and so on: a few wide texts
    leave room for few slots, which the narrow ones need not suffer."""
    groups, left = [], np.argsort(-widths, kind="stable")
    while len(left):
        alike = 2 * widths[left] > widths[left[0]]
        groups.append(left[alike])
        left = left[~alike]
    return groups


def _in_batches(model: PreTrainedModel, prompts: Sequence[NDArray[Any]], limits: Ints, draws: _Draws, forward_tokens: int) -> list[Text]:
    """In batches of similar widths, each of which lasts until its longest text ends."""
    found = [NOTHING] * len(prompts)
    for group in group_by_length(np.asarray([len(p) for p in prompts], dtype=np.int64) + limits, forward_tokens):
        numbers = np.asarray(group)
        texts = _batch(model, [prompts[n] for n in group], limits[numbers], _Forced(draws, numbers), draws.sampling.stop)
        for number, text in zip(group, texts, strict=True):
            found[number] = text
    return found


@dataclass
class _Forced(LogitsProcessor):
    """Leaves `generate` one candidate; keeps its log-probability."""

    choose: Choose
    texts: Ints
    """`(B,)` their numbers."""
    logprobs: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen, logprobs = self.choose(scores, self.texts, np.full(len(self.texts), len(self.logprobs), dtype=np.int64))
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


def _batch(model: PreTrainedModel, prompts: Sequence[NDArray[Any]], limits: Ints, forced: _Forced, stop: tuple[int, ...]) -> list[Text]:
    """The texts of one batch, padded on the left."""
    width = max(len(p) for p in prompts)
    ids = np.full((len(prompts), width), PAD_ID, dtype=np.int64)
    mask = np.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = prompt
        mask[b, width - len(prompt) :] = 1
    # the model's own settings, such as a repetition penalty, must not enter
    model.generation_config = GenerationConfig(eos_token_id=list(stop) or None, pad_token_id=stop[0] if stop else PAD_ID)
    whole: Any = model.generate(
        input_ids=torch.from_numpy(ids).to(model.device),
        attention_mask=torch.from_numpy(mask).to(model.device),
        logits_processor=LogitsProcessorList([forced]),
        max_new_tokens=int(limits.max()),
        do_sample=False,
    )
    tokens = whole[:, width:].cpu().numpy().astype(np.int32)
    logprobs = torch.stack(forced.logprobs, dim=-1).cpu().numpy()
    return [_until_stop(t[:most], p[:most], stop) for t, p, most in zip(tokens, logprobs, limits, strict=True)]


def _until_stop(tokens: NDArray[np.int32], logprobs: NDArray[np.float32], stop: tuple[int, ...]) -> Text:
    """What was written before padding."""
    ends = np.flatnonzero(np.isin(tokens, stop))
    size = int(ends[0]) + 1 if len(ends) else len(tokens)
    return Text(tokens[:size], logprobs[:size].astype(np.float32), bool(len(ends)))
