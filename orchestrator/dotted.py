"""Settings of a recipe by their dotted paths, in the recipe as it is written: before it is checked, with its short forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

SHORT_KEYS = {"student": "model", "data": "train", "layout": "type", "strategy": "type", "signals": "mode"}
"""The key that a plain string stands for, by the setting where it may stand."""
_KEEPS_SIBLINGS = {"student", "data", "signals"}
"""`student=other/model` changes the model of a student and keeps its LoRA, `signals=store` keeps its codec;
another strategy or layout starts afresh."""
ABSENT: Final = object()
"""What `get` finds where a recipe says nothing."""


def put(content: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets `keys` of a recipe's content to `value`, making what lies above it; items of lists go by their number.

    `LookupError` for an item that a list does not have.
    """
    here: Any = content
    for key in keys[:-1]:
        here = _entered(here, key)
    last = keys[-1]
    if isinstance(here, list):
        here[_position(here, last)] = value
    elif isinstance(value, str) and last in _KEEPS_SIBLINGS and isinstance(here.get(last), dict):
        here[last] = {**here[last], SHORT_KEYS[last]: value}
    else:
        here[last] = value


def get(content: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What stands at `keys`, short forms read as what they mean; `ABSENT` when nothing does."""
    here: Any = content
    for above, key in zip(["", *keys], keys, strict=False):
        if isinstance(here, str) and SHORT_KEYS.get(above) == key:
            return here
        if isinstance(here, list) and key.isdecimal() and int(key) < len(here):
            here = here[int(key)]
        elif isinstance(here, Mapping) and key in here:
            here = here[key]
        else:
            return ABSENT
    return here


def _entered(here: Any, key: str) -> Any:
    """What stands at `key`, made ready to have something set in it."""
    if isinstance(here, list):
        return here[_position(here, key)]
    inner = here.get(key)
    if isinstance(inner, str) and key in SHORT_KEYS:
        inner = {SHORT_KEYS[key]: inner}
    here[key] = inner if isinstance(inner, dict | list) else {}
    return here[key]


def _position(items: Sequence[Any], key: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise LookupError(f"no item {key!r} in a list of {len(items)}; the first is 0")
    return int(key)
