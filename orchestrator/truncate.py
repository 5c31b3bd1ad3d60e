"""A student cut out of a larger saved network: fewer layers, narrower ones, and in what stays the network's own weights.

The control that needs no teacher (arXiv:2305.14864): a strategy that distils has to beat such a student of the same size on
cross-entropy alone. Nothing is measured to choose what stays; of a width its first numbers do.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveInt

from orchestrator.errors import Refusal
from orchestrator.settings import Model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from orchestrator.config import StudentConfig

WHERE = "student.truncate"
WIDTHS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "attention_heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
}
"""Settings of widths, and what configurations of transformers call them."""
PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists of a configuration that have one value for each layer."""
BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "mlp_only_layers", "sparse_step", "first_k_dense_replace")
"""Settings by which a layer computes otherwise because of its number."""
SIDE_BY_SIDE = {"c_attn": 3}
"""Linear layers of GPT-2 whose outputs are several layers' side by side, by name, and how many."""
_NUMBERED = re.compile(r"(.*?\.)(\d+)\.")


class Truncate(Model):
    """What a student keeps of the network that `student.model` names."""

    layers: tuple[NonNegativeInt, ...] | dict[Literal["first", "last", "even"], PositiveInt] | None = None
    """Numbers of the layers that stay, from 0 and rising; or how many: `{first: 6}`, `{last: 6}`, or `{even: 6}`, spread from the first
    to the last. All of them when absent."""
    hidden_size: PositiveInt | None = None
    """Width between the layers. What is read from it by norms and embeddings is cut as well."""
    intermediate_size: PositiveInt | None = None
    """Width inside the MLPs."""
    attention_heads: PositiveInt | None = None
    """Heads of queries; each stays as wide as it was, and with its own head of keys and values."""
    key_value_heads: PositiveInt | None = None
    """Heads of keys and values, where they are fewer than those of queries: in the old proportion."""

    def kept(self, total: int) -> list[int]:
        """Numbers of the layers of `total` that stay. `Refusal` for layers that are not there."""
        match self.layers:
            case None:
                return list(range(total))
            case tuple():
                rising = list(self.layers) == sorted(set(self.layers))
                if not self.layers or not rising or self.layers[-1] >= total:
                    expected = f"some of the numbers 0 to {total - 1}, rising"
                    raise Refusal(f"{WHERE}.layers", f"{list(self.layers)}", expected, "Name layers that the network has, each once.")
                return list(self.layers)
        if len(self.layers) != 1 or max(self.layers.values()) > total:
            expected = f"one of first, last and even, with at most the {total} layers of the network"
            raise Refusal(f"{WHERE}.layers", f"{self.layers}", expected, "Correct it, such as {even: 6}.")
        ((how, size),) = self.layers.items()
        if how == "even":
            return [(i * (total - 1) + (size - 1) // 2) // max(1, size - 1) for i in range(size)]
        return list(range(size)) if how == "first" else list(range(total - size, total))


def begins_as_saved(student: StudentConfig) -> bool:
    """Whether the student's first weights lie as a model of their own in `student.model`: neither fresh nor cut out."""
    return student.init == "pretrained" and student.truncate is None


def cut_fingerprint(whole: str, cut: Truncate) -> str:
    """What identifies the weights of a student that is cut out of weights with the fingerprint `whole`."""
    return f"sha256:{hashlib.sha256(f'{whole} {cut.model_dump_json()}'.encode()).hexdigest()}"


def cut_shape(shape: PreTrainedConfig, cut: Truncate) -> PreTrainedConfig:
    """The configuration of the student. `Refusal` for what the network does not have, or would compute otherwise."""
    made = copy.deepcopy(shape)
    text = made.get_text_config()
    total = int(text.num_hidden_layers)
    kept = cut.kept(total)
    numbered = [name for name in BY_NUMBER if getattr(text, name, None)]
    if numbered and kept != list(range(total)):
        raise _unknown(shape, f"layers that depend on their number ({numbered[0]})", "layers that are alike")
    for name in PER_LAYER:
        if isinstance(values := getattr(text, name, None), list):
            setattr(text, name, [values[i] for i in kept])
    text.num_hidden_layers = len(kept)
    _cut_widths(text, cut)
    return made


def _cut_widths(text: PreTrainedConfig, cut: Truncate) -> None:
    """Sets the new widths; heads keep theirs."""
    asked = {name: size for name in WIDTHS if (size := getattr(cut, name)) is not None}
    if not asked:
        return
    heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    own = getattr(text, "head_dim", None)
    for name, size in asked.items():
        there = getattr(text, WIDTHS[name], None)
        if there is None or size > there:
            got = f"{size}, for a network that has {'none' if there is None else there} of its own"
            raise Refusal(f"{WHERE}.{name}", got, "a width that the network has, or less", "Lower it, or leave it out.")
        setattr(text, WIDTHS[name], size)
    if "attention_heads" in asked and groups == heads and hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = cut.attention_heads
    new, new_groups = int(text.num_attention_heads), int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    if new * groups != new_groups * heads:
        expected = f"{heads // groups} of queries for each of keys and values, as in the network"
        do = f"Set {WHERE}.attention_heads and {WHERE}.key_value_heads together."
        raise Refusal(f"{WHERE}.attention_heads", f"{new} heads with {new_groups} of keys and values", expected, do)
    if hasattr(text, "head_dim"):
        text.head_dim = own or hidden // heads
    elif int(text.hidden_size) * heads != hidden * new:
        do = f"Set {WHERE}.hidden_size and {WHERE}.attention_heads together, in the network's proportion."
        got = f"{new} heads for a width of {text.hidden_size}"
        raise Refusal(f"{WHERE}.hidden_size", got, f"heads that stay {hidden // heads} wide, as this architecture wants it", do)


def sources(shape: PreTrainedConfig, cut: Truncate, whole: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor of the student the name of the one in the `whole` network that it is cut out of. Reads shapes alone.

    `Refusal` for an architecture whose tensors do not correspond.
    """
    total = int(shape.get_text_config().num_hidden_layers)
    kept, prefix = cut.kept(total), _layers_prefix(shape, whole, total)
    found: dict[str, str] = {}
    for name, tensor in student.items():
        number = _NUMBERED.match(name)
        own = number is not None and number[1] == prefix
        source = f"{prefix}{kept[int(number[2])]}.{name[number.end() :]}" if number and own else name
        if source not in whole:
            raise _unknown(shape, f"no {source!r} to make {name!r} of", "the same tensors in every layer")
        if not _fits(name, whole[source].shape, tensor.shape):
            sizes = f"{tuple(whole[source].shape)} to be cut to {tuple(tensor.shape)}"
            raise _unknown(shape, f"{source!r} of {sizes}", "widths of separate linear layers")
        found[name] = source
    return found


def fill(student: Mapping[str, Tensor], whole: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Copies into every tensor of the student what it is cut out of. Call it without gradients."""
    for name, source in names.items():
        student[name].copy_(_first(name, whole[source], student[name].shape))


def about(cut: Truncate, total: int) -> str:
    """What stays, in words."""
    widths = [f"{name.replace('_', ' ')} {size}" for name in WIDTHS if (size := getattr(cut, name)) is not None]
    return ", ".join([f"layers {' '.join(map(str, cut.kept(total)))} of {total}", *widths])


def _layers_prefix(shape: PreTrainedConfig, names: Iterable[str], total: int) -> str:
    """How the names of the layers' tensors begin, up to the number."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for match in filter(None, map(_NUMBERED.match, names)):
        numbers[match[1]].add(match[2])
    fitting = [prefix for prefix, found in numbers.items() if len(found) == total]
    if len(fitting) != 1:
        raise _unknown(shape, f"{len(fitting)} lists of {total} layers ({', '.join(fitting) or 'none'})", "one")
    return fitting[0]


def _fits(name: str, whole: Sequence[int], part: Sequence[int]) -> bool:
    if len(whole) != len(part) or any(p > w for p, w in zip(part, whole, strict=True)):
        return False
    several = _side_by_side(name)
    if several == 1:  # one whose shape hides that it is made of several cannot be cut here
        return tuple(whole) == tuple(part) or not re.search(r"qkv|query_key_value|gate_up|fused", name)
    return whole[-1] % several == part[-1] % several == 0


def _first(name: str, whole: Tensor, shape: Sequence[int]) -> Tensor:
    """The first numbers along every axis; along the last one of several layers side by side, the first of each."""
    several = _side_by_side(name)
    for axis, size in enumerate(shape[:-1] if several > 1 else shape):
        whole = whole.narrow(axis, 0, size)
    if several == 1:
        return whole
    apart = whole.unflatten(-1, (several, whole.shape[-1] // several))
    first: Tensor = apart.narrow(-1, 0, shape[-1] // several).flatten(-2)
    return first


def _side_by_side(name: str) -> int:
    return SIDE_BY_SIDE.get(name.rpartition(".")[0].rpartition(".")[2], 1)


def _unknown(shape: PreTrainedConfig, got: str, expected: str) -> Refusal:
    do = "Keep all layers and widths, or start from a smaller saved model of the family."
    return Refusal(f"{WHERE} of {shape.model_type}", got, expected, do)
