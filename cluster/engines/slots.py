"""Many texts written side by side, each in a slot of one cache that is allocated once: a slot whose text has ended is refilled at once.

A slot is a row of every layer's keys and values, filled up to a place of its own. Free slots go to waiting prompts, which are read
together in one forward; then all live slots advance by one token in one forward. Live slots are the first ones: once nothing
waits, the last of them move into those that fell free, so that no step computes a dead slot, and none attends further than the
longest live text. Which text is in which slot follows from the prompts, the limits and where texts end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from cluster.causal_lm import backbone, explained_by_rounding, output_head, probing, relative_difference, vocabulary_rows
from cluster.engines.texts import NOTHING, Text
from cluster.forwards import PAD_ID, Ints

WIDTH_STEP = 32
"""Attended widths are multiples of it, so that their kernels are few."""
FREE = -1

Choose = Callable[[Tensor, Ints, Ints], tuple[Tensor, Tensor]]
"""From logits `(n, V)`, numbers of the texts `(n,)` and tokens that each has `(n,)` to the next ids `(n,)` and their log-probabilities
`(n,)`."""


class SlotCache(Cache):
    """Keys and values of `slots` texts of up to `room` tokens; who runs a forward says first where it writes."""

    def __init__(self, layers: int, slots: int, room: int):
        super().__init__(layers=[_SlotLayer(self, slots, room) for _ in range(layers)])
        self.slots = torch.zeros(0, dtype=torch.int64)
        """`(n,)` that the next forward writes."""
        self.places: Tensor | None = None
        """`(n,)` where the next forward writes one token of each slot; None when it reads prompts from place 0."""
        self.width = 0
        """Places of each slot that the next forward of single tokens attends to."""

    def before_prompts(self, slots: Tensor) -> None:
        """The next forward reads prompts, padded on the right, into `slots` `(n,)`; they attend to themselves alone."""
        self.slots, self.places = slots, None

    def before_step(self, places: Tensor, width: int) -> None:
        """The next forward reads one token for each of the first n slots, at `places` `(n,)` below `width`."""
        self.slots, self.places, self.width = torch.arange(len(places), device=places.device), places, width

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies slots `source` `(n,)` to the slots `target` `(n,)`."""
        for layer in self.layers:
            for whole in (layer.keys, layer.values):
                whole[target] = whole[source]


class _SlotLayer(CacheLayerMixin):
    """Of one layer. What lies beyond a slot's place is an older text's: the mask of a step hides it."""

    is_sliding = False

    def __init__(self, home: SlotCache, slots: int, room: int):
        super().__init__()
        self.home, self.shape = home, (slots, room)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, room = self.shape
        # zeros, because a hidden NaN would still make NaN of a sum that weighs it with 0
        self.keys, self.values = (s.new_zeros(slots, s.shape[1], room, s.shape[3]) for s in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, places, width = self.home.slots, self.home.places, self.home.width
        if places is None:
            size = key_states.shape[2]
            self.keys[slots, :, :size], self.values[slots, :, :size] = key_states, value_states
            return key_states, value_states
        self.keys[slots, :, places], self.values[slots, :, places] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[: len(slots), :, :width], self.values[: len(slots), :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.shape[1]


@dataclass(frozen=True)
class Network:
    """A causal network that reads prompts into slots and goes on from them."""

    model: PreTrainedModel
    cache: SlotCache

    def read(self, prompts: Sequence[NDArray[Any]], slots: Ints) -> Tensor:
        """Hidden states `(n, D)` that predict what follows `prompts`, which are read into `slots` `(n,)`."""
        ids = np.full((len(prompts), max(len(p) for p in prompts)), PAD_ID, dtype=np.int64)
        for b, prompt in enumerate(prompts):
            ids[b, : len(prompt)] = prompt
        self.cache.before_prompts(self._moved(slots))
        places = torch.arange(ids.shape[1], device=self.model.device)[None].expand(len(ids), -1)
        states = self._states(input_ids=self._moved(ids), position_ids=places)
        last = self._moved(np.asarray([len(p) - 1 for p in prompts]))
        return states[torch.arange(len(ids), device=states.device), last]

    def step(self, tokens: Ints, sizes: Ints) -> Tensor:
        """Hidden states `(n, D)` after `tokens` `(n,)` of the first n slots, which hold `sizes` `(n,)` tokens before them."""
        width = -(-int(sizes.max() + 1) // WIDTH_STEP) * WIDTH_STEP
        places = self._moved(sizes)
        self.cache.before_step(places, min(width, self.cache.get_max_length()))
        beyond = torch.arange(self.cache.width, device=places.device) > places[:, None, None, None]
        # added to scores as it is by every kind of attention that takes a mask of four dimensions
        mask = torch.zeros(beyond.shape, dtype=self.model.dtype, device=places.device)
        mask.masked_fill_(beyond, torch.finfo(self.model.dtype).min)
        return self._states(input_ids=self._moved(tokens)[:, None], position_ids=places[:, None], attention_mask=mask)[:, 0]

    def _states(self, **inputs: Tensor) -> Tensor:
        states: Tensor = backbone(self.model)(**inputs, past_key_values=self.cache, use_cache=True).last_hidden_state
        return states

    def _moved(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.model.device)


def network(model: PreTrainedModel, slots: int, room: int) -> Network:
    """The model with a cache of `slots` slots of `room` tokens."""
    return Network(model, SlotCache(len(DynamicCache(config=model.config)), slots, room))


def has_slots(model: PreTrainedModel) -> bool:
    """Whether the model's past can be kept in slots: it says that it keeps keys and values of all tokens in all layers, it takes
    positions and a mask, and what it says of two uneven texts side by side is what it says of each alone."""
    if not _declares_slots(model):
        return False
    texts = [(np.arange(size) * 7 + 3) % vocabulary_rows(model.config) for size in (6, 3)]
    with probing(model):
        two = network(model, slots=2, room=8)
        two.read([t[:-1] for t in texts], np.arange(2))
        found = two.step(np.asarray([t[-1] for t in texts]), np.asarray([len(t) - 1 for t in texts]))
        alone = [backbone(model)(input_ids=torch.from_numpy(t)[None].to(model.device), use_cache=False) for t in texts]
    expected = torch.stack([a.last_hidden_state[0, -1] for a in alone])
    return explained_by_rounding(relative_difference(found.float(), expected.float()), model.dtype)


def _declares_slots(model: PreTrainedModel) -> bool:
    """By configuration and signature."""
    takes = inspect.signature(backbone(model).forward).parameters
    config = model.config
    return (
        not (config.is_encoder_decoder or getattr(config, "add_cross_attention", False))
        and config._attn_implementation in {"sdpa", "eager"}
        and {"position_ids", "attention_mask", "past_key_values"} <= set(takes)
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


def write_in_slots(network: Network, prompts: Sequence[NDArray[Any]], limits: Ints, stop: Sequence[int], choose: Choose) -> list[Text]:
    """The text after each of `prompts`: up to `limits` `(T,)` tokens, all above 0, or to the first of the ids `stop`.

    Longer prompts begin first. The cache must have room for every prompt and its limit.
    """
    return _Board(network, prompts, limits, stop, choose).run()


class _Board:
    """Which text is in which slot, and what has been written there."""

    def __init__(self, network: Network, prompts: Sequence[NDArray[Any]], limits: Ints, stop: Sequence[int], choose: Choose):
        self.network, self.prompts, self.limits, self.choose = network, prompts, limits, choose
        self.head = output_head(network.model)
        self.stop = np.isin(np.arange(len(self.head.weight)), stop)
        # alike prompts are read together; limits do not enter, because most texts end before them
        self.waiting = np.argsort([-len(p) for p in prompts], kind="stable")
        slots = network.cache.layers[0].shape[0]
        self.text = np.full(slots, FREE, dtype=np.int64)
        self.size, self.written, self.last = (np.zeros(slots, dtype=np.int64) for _ in range(3))
        """Tokens in the cache, tokens written, and the last of those, which the cache lacks."""
        self.tokens = np.zeros((slots, limits.max(initial=0)), dtype=np.int32)
        self.logprobs = np.zeros(self.tokens.shape, dtype=np.float32)
        self.found = [NOTHING] * len(prompts)

    def run(self) -> list[Text]:
        self._admit()
        while live := int((self.text != FREE).sum()):
            states = self.network.step(self.last[:live], self.size[:live])
            self.size[:live] += 1
            self._record(states, np.arange(live))
            self._admit()
        return self.found

    def _admit(self) -> None:
        """Gives free slots to those who wait; again, when a text ended with its first token."""
        while len(self.waiting) and len(free := np.flatnonzero(self.text == FREE)):
            slots = free[: len(self.waiting)]
            numbers, self.waiting = self.waiting[: len(slots)], self.waiting[len(slots) :]
            prompts = [self.prompts[n] for n in numbers]
            self.text[slots], self.size[slots], self.written[slots] = numbers, [len(p) for p in prompts], 0
            self._record(self.network.read(prompts, slots), slots)
        self._close_up()

    def _close_up(self) -> None:
        """Makes the live slots the first ones."""
        used = np.flatnonzero(self.text != FREE)
        source, target = used[used >= len(used)], np.flatnonzero(self.text[: len(used)] == FREE)
        if not len(source):
            return
        self.network.cache.move(torch.from_numpy(source), torch.from_numpy(target))
        for values in (self.text, self.size, self.written, self.last, self.tokens, self.logprobs):
            values[target] = values[source]
        self.text[source] = FREE

    def _record(self, states: Tensor, slots: Ints) -> None:
        """Chooses the next token of `slots` by their hidden `states` `(n, D)`, and frees those whose text it ends."""
        place, number = self.written[slots], self.text[slots]
        ids, logprobs = (found.cpu().numpy() for found in self.choose(self.head.logits(states), number, place))
        self.tokens[slots, place], self.logprobs[slots, place] = ids, logprobs
        self.last[slots], self.written[slots] = ids, place + 1
        finished = self.stop[ids]
        for at in np.flatnonzero(finished | (place + 1 >= self.limits[number])):
            slot, size = slots[at], place[at] + 1
            self.found[number[at]] = Text(self.tokens[slot, :size].copy(), self.logprobs[slot, :size].copy(), bool(finished[at]))
            self.text[slot] = FREE
