"""A network as its files tell it: its shape, its size and what a forward keeps, without reading a weight."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cluster.causal_lm import attention_argument, output_head, vocabulary_rows
from orchestrator.config import StudentConfig
from orchestrator.errors import Refusal
from orchestrator.models import backbone_of, load_config, lora_config
from orchestrator.saved_models import fingerprint
from orchestrator.taps import tap_widths
from orchestrator.truncate import Truncate, about, cut_fingerprint, cut_shape, sources
from strategies.taps import Tap

WHOLE_LAYERS = 6
"""Deeper networks are run at two small depths and their layers extrapolated."""


@dataclass(frozen=True)
class Network:
    """One saved network. Sizes are exact, counted on a copy without memory."""

    where: str
    """Recipe key that names it, for messages."""
    source: str
    """Folder or hub name."""
    config: PreTrainedConfig
    trust_remote_code: bool
    fingerprint: str
    dtype: torch.dtype
    """Of the weights once loaded."""
    parameters: int
    trained: int
    """Parameters that an optimizer would step; all of them without an adapter."""
    tied: int
    """Trained numbers that a state dictionary names a second time, such as a head tied to the embedding."""
    layers: int
    hidden: int
    widest: int
    """Largest output of any linear layer but the head."""
    origin: str = ""
    """What it is cut out of, in words; "" for a network that is whole."""

    @property
    def vocabulary(self) -> int:
        """Ids it embeds and predicts, padding included."""
        return vocabulary_rows(self.config)

    @property
    def context(self) -> int | None:
        """Longest row it was made for, in tokens; None when its configuration does not say."""
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return int(found) if found and found > 0 else None

    @property
    def architecture(self) -> str:
        return str((self.config.architectures or [self.config.model_type])[0])


def student_network(config: StudentConfig) -> Network:
    """The student with its adapter. `Refusal` when an adapter's targets do not exist or include the head."""
    where = "student.model"
    fresh = config.init == "random"
    shape = load_config(config.model, config.revision, config.trust_remote_code, weights=not fresh)
    if config.truncate is None:
        return _network(where, config.model, config.revision, shape, config.dtype, config)
    return _cut_network(where, shape, config, config.truncate)


def _cut_network(where: str, shape: PreTrainedConfig, config: StudentConfig, cut: Truncate) -> Network:
    """A student that is cut out of a larger network of the configuration `shape`."""
    found = _network(where, config.model, config.revision, cut_shape(shape, cut), config.dtype, config)
    with torch.device("meta"):
        whole, student = _build(shape, config), _build(found.config, config)
    sources(shape, cut, whole.state_dict(), student.state_dict())
    total = int(shape.get_text_config().num_hidden_layers)
    origin = f"{about(cut, total)}, cut out of {sum(p.numel() for p in whole.parameters()):,} parameters"
    return replace(found, fingerprint=cut_fingerprint(found.fingerprint, cut), origin=origin)


def teacher_network(name: str, model: str, revision: str | None, trust_remote_code: bool, dtype: str) -> Network:
    """What the endpoint `name` loads."""
    shape = load_config(model, revision, trust_remote_code)
    return _network(
        f"endpoints.{name}.model", model, revision, shape, dtype, StudentConfig(model=model, trust_remote_code=trust_remote_code)
    )


def _network(where: str, source: str, revision: str | None, shape: PreTrainedConfig, dtype: str, config: StudentConfig) -> Network:
    with torch.device("meta"):
        base = _build(shape, config)
        model = _adapted(base, config)
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {n: p for n, p in named.items() if p.requires_grad}
    once = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = output_head(base).weight
    linear = [m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not head]
    text = shape.get_text_config()
    return Network(
        where=where,
        source=source,
        config=shape,
        trust_remote_code=config.trust_remote_code,
        fingerprint=fingerprint(source, revision),
        dtype=(shape.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype),
        parameters=sum(p.numel() for p in model.parameters()),
        trained=once,
        tied=sum(p.numel() for p in trained.values()) - once,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        widest=max(linear, default=4 * int(text.hidden_size)),
    )


def _build(shape: PreTrainedConfig, config: StudentConfig) -> PreTrainedModel:
    shape = copy.deepcopy(shape)
    shape.use_cache = False
    attention = "sdpa" if config.attention.startswith("flash") else config.attention
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        shape, dtype=torch.float32, attn_implementation=attention_argument(attention), trust_remote_code=config.trust_remote_code
    )
    return model


def _adapted(base: PreTrainedModel, config: StudentConfig) -> PreTrainedModel | PeftModel:
    if config.lora is None:
        return base
    where, head = "student.lora.target_modules", base.get_output_embeddings()
    head_name = next((name for name, module in base.named_modules() if module is head), "")
    linear = sorted({name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head})
    do = f"Name some of {', '.join(linear)}, or all-linear."
    given = config.lora.target_modules
    written = given if isinstance(given, str) else ", ".join(given)
    try:
        model = get_peft_model(base, lora_config(config.lora))
    except ValueError as error:
        raise Refusal(where, f"{written!r}, which no module is called", "names of the network's linear layers", do) from error
    if head_name in model.base_model.targeted_module_names:
        raise Refusal(where, f"the output head ({head_name})", "targets without it, because teaching applies the head itself", do)
    return model


def inner_widths(network: Network, config: StudentConfig, taps: Collection[Tap]) -> dict[Tap, int]:
    """Width of each tap without reading a weight; none for an architecture whose code looks at numbers while it runs.

    `ValueError` for a layer, or a projection of its attention, that the network does not have.
    """
    with torch.device("meta"):
        model = _build(network.config, config)
    try:
        with FakeTensorMode():
            _move_to_cpu(model)
            return tap_widths(model, taps)
    except (RuntimeError, NotImplementedError):  # what fake tensors raise when code depends on values
        return {}


def saved_bytes_per_forward(network: Network, config: StudentConfig, rows: int, length: int, bf16: bool, checkpointing: bool) -> int:
    """Bytes that a training forward over `(rows, length)` tokens keeps for its backward, outside the head.

    Counted by running the real code on tensors without memory; an architecture whose code looks at numbers while it
    runs, such as some mixtures of experts, gets a rule of thumb.
    """
    try:
        return _counted(network, config, (rows, length), bf16, checkpointing)
    except (RuntimeError, NotImplementedError):  # what fake tensors raise when code depends on values
        per_layer = 4 * network.widest + 15 * network.hidden
        layers = 1 if checkpointing else network.layers
        return rows * length * (2 if bf16 else 4) * (layers * per_layer + network.layers * network.hidden)


def _counted(network: Network, config: StudentConfig, size: tuple[int, int], bf16: bool, checkpointing: bool) -> int:
    with torch.device("meta"):
        model = _adapted(_build(network.config, config), config)
    model.train()
    with FakeTensorMode():
        _move_to_cpu(model)
        if checkpointing:
            one = _at_depth(model, 2, size, bf16) - _at_depth(model, 1, size, bf16)
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return one + _extrapolated(model, network.layers, size, bf16)
        return _extrapolated(model, network.layers, size, bf16)


def _move_to_cpu(model: nn.Module) -> None:
    """Replaces tensors on no device by ones on the CPU, fake ones inside a `FakeTensorMode`; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def _extrapolated(model: PreTrainedModel | PeftModel, layers: int, size: tuple[int, int], bf16: bool) -> int:
    if layers <= WHOLE_LAYERS:
        return _at_depth(model, layers, size, bf16)
    low, high = (_at_depth(model, depth, size, bf16) for depth in (2, 4))
    return high + (high - low) * (layers - 4) // 2


def _at_depth(model: PreTrainedModel | PeftModel, layers: int, size: tuple[int, int], bf16: bool) -> int:
    """Bytes saved by a forward through the first `layers` layers."""
    body = backbone_of(model)
    holders = [m for m in body.modules() if any(isinstance(child, nn.ModuleList) for child in m.children())][:1]
    lists = {name: child for m in holders for name, child in m.named_children() if isinstance(child, nn.ModuleList)}
    for name, child in lists.items():
        setattr(holders[0], name, nn.ModuleList(list(child)[:layers]))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        kept.append(tensor)  # a freed storage's address could come again
        return tensor

    ids = torch.zeros(size, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        body(input_ids=ids, use_cache=False)
    for name, child in lists.items():
        setattr(holders[0], name, child)
    return sum(found.values())
