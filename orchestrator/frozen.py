"""A frozen player: a teacher's network inside a training worker, which reads the student's own micro-batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cluster.causal_lm import backbone, output_head
from cluster.config import EndpointConfig, TransformersEndpoint
from cluster.engines.transformers import LOGITS_AT_ONCE, load_frozen
from orchestrator.errors import Refusal
from orchestrator.microbatch import MicroBatch
from orchestrator.models import check_head, check_packing
from orchestrator.taps import recorded, tap_widths, tapped
from strategies.core import AnyTerm, Player, StatesTerm
from strategies.head import Head
from strategies.taps import OUTPUT, Tap, Tapped


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

    def states(self, micro: MicroBatch) -> tuple[Tensor, Head]:
        """The states `(N, D)` that predict the loss tokens, and the head that makes logits of them."""
        return self.taps(micro, {OUTPUT}).tokens(OUTPUT), self.head

    @torch.no_grad()
    def logprobs(self, hidden: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of states `(N, D)`: ids `(N, K)` int64 by falling probability, their log-probabilities `(N, K)` float32 at temperature 1,
        and those of `labels` `(N,)`; normalised over the usable ids. Never holds `(N, V)`.
        """
        head = self.head
        room = LOGITS_AT_ONCE if hidden.device.type == "cpu" else 64 * LOGITS_AT_ONCE
        tokens = max(64, room // len(head.weight))
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for piece, given in zip(hidden.split(tokens), labels.split(tokens), strict=True):
                logits = head.logits(piece).log_softmax(-1)
                best, ids = logits.topk(top_k)
                inside = given < logits.shape[-1]
                own = logits.gather(-1, given.clamp_max(logits.shape[-1] - 1)[:, None])[:, 0]
                found.append((ids, best, torch.where(inside, own, -torch.inf)))
        ids, best, own = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ids, best, own


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


def not_a_network(endpoint: str) -> Refusal:
    """An endpoint that no frozen player can be."""
    do = "Give the endpoint a saved model with engine: transformers."
    return Refusal(f"endpoints.{endpoint}", "an engine without a network", "a network that training workers can load", do)


def taught(micro: MicroBatch, terms: tuple[AnyTerm, ...], frozen: Mapping[str, FrozenPlayer]) -> MicroBatch:
    """The micro-batch with what frozen players show of their inner states to those of `terms` that ask, one forward each."""
    wanted: dict[str, set[Tap]] = {}
    for term in terms:
        if isinstance(term, StatesTerm):
            wanted.setdefault(term.signal, set()).update(term.objective.taps.teacher)
    return replace(micro, taught={name: frozen[name].taps(micro, taps) for name, taps in wanted.items()}) if wanted else micro
