"""A frozen player: a teacher's network inside a training worker, which reads the student's own micro-batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cluster.answers import answer, refuse_dropped
from cluster.causal_lm import backbone, input_embeddings, output_head
from cluster.config import EndpointConfig, TransformersEndpoint
from cluster.engines.transformers import load_frozen
from orchestrator.errors import Refusal
from orchestrator.microbatch import MicroBatch
from orchestrator.models import check_head, check_packing
from orchestrator.taps import recorded, tap_widths, tapped
from strategies.aligned import Ends
from strategies.core import Player, ScoreRequest
from strategies.head import Head
from strategies.taps import Tap, Tapped


class Shows(Protocol):
    """Whoever shows inner states of a teacher to a training worker."""

    def widths(self, wanted: Collection[Tap]) -> dict[Tap, int]:
        """Width of each tap; `ValueError` for one that there is not."""
        ...

    def taps(self, micro: MicroBatch, wanted: Collection[Tap]) -> Tapped:
        """What `wanted` gives for a micro-batch on the worker's device."""
        ...


class FrozenPlayer:
    """The saved model of an endpoint, whole on every rank, in evaluation mode and in its own dtype; never a gradient.

    It reads one micro-batch in one forward, laid out as the student reads it, whatever the endpoint's `forward_tokens`. What it
    says equals what a stage scores but for the rounding of other batch shapes.
    """

    def __init__(self, config: TransformersEndpoint, device: torch.device, vocabulary: int | None = None, packed: bool = False):
        """Loads the model. `vocabulary` is how many ids, from 0, its head may name; all of the model's when absent.

        `Refusal` when the head is not understood, or with `packed` when rows of one sequence would see each other;
        `ValueError` when quantisation is asked of a CPU.
        """
        self.config = config
        self.model = load_frozen(config, device)
        self.vocabulary = vocabulary
        check_head(self.model)
        if packed:
            check_packing(self.model)

    @property
    def head(self) -> Head:
        """Its output head over the usable ids."""
        found, usable = output_head(self.model), slice(self.vocabulary)
        return Head(found.weight[usable], None if found.bias is None else found.bias[usable], found.transform)

    def widths(self, wanted: Collection[Tap]) -> dict[Tap, int]:
        """Width of each tap; `ValueError` for one that the network does not have."""
        return tap_widths(self.model, wanted)

    @torch.no_grad()
    def taps(self, micro: MicroBatch, wanted: Collection[Tap]) -> Tapped:
        """What `wanted` gives for a micro-batch on the player's device, from one forward. `OUTPUT` is the state its head reads."""
        places = {} if micro.position_ids is None else {"position_ids": micro.position_ids}
        with torch.autocast(micro.input_ids.device.type, enabled=False), recorded(backbone(self.model), wanted) as outputs:
            backbone(self.model)(input_ids=micro.input_ids, use_cache=False, **places)
        return tapped(micro, outputs, self.head)

    @torch.no_grad()
    def score(self, micro: MicroBatch, hidden: Tensor, request: ScoreRequest) -> dict[str, Tensor]:
        """What a stage would score of a micro-batch: columns `(N, ...)`, of the states `(N, D)` that `taps` gave for `OUTPUT`."""
        head = output_head(self.model)
        with torch.autocast(hidden.device.type, enabled=False):
            found = answer(hidden, head, micro.labels, micro.keys, request, self.vocabulary or len(head.weight))
        refuse_dropped(found["dropped"], self.config.max_dropped_mass, self.config.model)
        return found


def load_frozen_players(
    wanted: Mapping[str, Player], endpoints: Mapping[str, EndpointConfig], vocabulary: int | None, packed: bool, device: torch.device
) -> dict[str, FrozenPlayer]:
    """Every frozen player of a strategy, from the endpoints that they name. `Refusal` for one that loads nothing."""
    found = {}
    for name, player in wanted.items():
        if player.trained:
            continue
        config = endpoints[player.model]
        if not isinstance(config, TransformersEndpoint):
            raise not_a_network(player.model)
        found[name] = FrozenPlayer(config, device, vocabulary, packed)
    return found


def load_head(config: TransformersEndpoint, device: torch.device, vocabulary: int | None) -> Head:
    """The output head of an endpoint's model over the usable ids; nothing else of the model stays in memory."""
    return _head(load_frozen(config, torch.device("cpu")), device, vocabulary)


def load_ends(config: TransformersEndpoint, device: torch.device) -> Ends:
    """Output head and input embeddings of an endpoint's model over all its ids, once in memory where they are one; nothing else stays."""
    model = load_frozen(config, torch.device("cpu"))
    head, table = _head(model, device, None), input_embeddings(model)
    tied = table.data_ptr() == output_head(model).weight.data_ptr()
    return Ends(head, head.weight if tied else table.detach().to(device, copy=True))


def _head(model: PreTrainedModel, device: torch.device, vocabulary: int | None) -> Head:
    found, usable = output_head(model), slice(vocabulary)
    bias = None if found.bias is None else found.bias[usable].detach().to(device, copy=True)
    return Head(found.weight[usable].detach().to(device, copy=True), bias, found.transform)


def not_a_network(endpoint: str) -> Refusal:
    """An endpoint that no frozen player can be."""
    do = "Give the endpoint a saved model with engine: transformers."
    return Refusal(f"endpoints.{endpoint}", "an engine without a network", "a network that training workers can load", do)
