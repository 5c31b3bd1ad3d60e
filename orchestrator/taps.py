"""Inner outputs of a Hugging Face network, collected by hooks during one forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.causal_lm import backbone, probing
from orchestrator.microbatch import MicroBatch
from strategies.head import Head
from strategies.taps import Tap, Tapped

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
"""What the linear layers that make a part are called."""


@contextmanager
def recorded(body: nn.Module, taps: Collection[Tap]) -> Iterator[dict[Tap, Tensor]]:
    """What `taps` give in the forward of the backbone `body` that runs inside: `(B, L, W)` with its gradient. No hook without taps.

    Hooks only keep what passes: they compute nothing, because a layer that is recomputed in backward must do the same again.
    `ValueError` for a layer, or a projection of its attention, that the network does not have.
    """
    found: dict[Tap, Tensor] = {}
    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(_hook(body, tap, found).remove)
        yield found


def tap_widths(model: PreTrainedModel, taps: Collection[Tap]) -> dict[Tap, int]:
    """Width of each tap, from a forward over two tokens; `ValueError` as from `recorded`."""
    if not taps:
        return {}
    body = backbone(model)
    with probing(model), recorded(body, taps) as found:
        body(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device), use_cache=False)
    return {tap: found[tap].shape[-1] for tap in taps}


def tapped(
    micro: MicroBatch, outputs: Mapping[Tap, Tensor], head: Head | None = None, embed: Callable[[Tensor], Tensor] | None = None
) -> Tapped:
    """What a network with this `head` gave for `micro`, with its rows told apart."""
    return Tapped(outputs, micro.index, micro.rows, micro.labels, head, micro.input_ids.flatten()[micro.index], embed)


def _hook(body: nn.Module, tap: Tap, found: dict[Tap, Tensor]) -> Any:
    if isinstance(tap.place, str):
        return body.register_forward_hook(_keeper(found, tap, lambda out: out.last_hidden_state))
    layers = _decoder_layers(body)
    number = tap.place.of(len(layers))
    if tap.part != "hidden":
        return _projection(body, layers, number, tap).register_forward_hook(_keeper(found, tap, lambda out: out))
    if number > 0:
        return layers[number - 1].register_forward_hook(_keeper(found, tap, lambda out: out[0] if isinstance(out, tuple) else out))

    def keep_input(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        found[tap] = args[0] if args else kwargs["hidden_states"]

    return layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)


def _keeper(found: dict[Tap, Tensor], tap: Tap, pick: Callable[[Any], Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        found[tap] = pick(out)

    return keep


def _decoder_layers(body: nn.Module) -> list[nn.Module]:
    """The outermost list of as many modules as the network has layers."""
    config: Any = body.config
    count = int(config.get_text_config().num_hidden_layers)
    found = next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if found is None:
        raise ValueError(f"{type(body).__name__}: got no list of its {count} layers; inner states of this architecture cannot be read")
    return list(found)


def _projection(body: nn.Module, layers: list[nn.Module], number: int, tap: Tap) -> nn.Module:
    name = PROJECTIONS[tap.part]
    inside = list(layers[number - 1].named_modules()) if number > 0 else []
    found: nn.Module | None = next((module for path, module in inside if path.rpartition(".")[2] == name), None)
    if found is None:
        raise ValueError(f"{tap}: got a layer of {type(body).__name__} without a module {name!r}; expected separate projections")
    return found
