"""A failed validation, told as a `Refusal`: where it is in the file, what stands there, and the nearest thing that was meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.errors import Refusal

_PREFIXES = ("Input should be ", "Value error, ", "expected ")


def refusal(error: ValidationError, model: type[BaseModel], content: Mapping[str, Any], where: str) -> Refusal:
    """The first problem of `error`, met when `content` was read as a `model` in the file or section `where`."""
    first = error.errors()[0]
    kind, path = first["type"], _written(first["loc"], content, missing=first["type"] == "missing")
    place = f"{where}: {'.'.join(path)}" if path else where
    if kind == "extra_forbidden":
        siblings = _fields_at(model, first["loc"][:-1])
        expected = f"one of {', '.join(sorted(siblings))}" if siblings else "a known key"
        return Refusal(place, f"the unknown key {path[-1]!r}", expected, nearest(path[-1], siblings) or "Remove it.")
    if kind == "missing":
        return Refusal(place, "nothing", "a value", f"Add {'.'.join(path)} to the recipe or as an override.")
    if kind == "union_tag_invalid":
        known = str(first["ctx"]["expected_tags"]).replace("'", "").split(", ")
        tag, key = str(first["ctx"]["tag"]), str(first["ctx"]["discriminator"]).strip("'")
        field = key if key.isidentifier() else "engine"  # a function tells engines apart
        return Refusal(f"{place}.{field}", repr(tag), f"one of {', '.join(sorted(known))}", nearest(tag, known) or "Correct the value.")
    if kind == "union_tag_not_found":
        key = str(first["ctx"]["discriminator"]).strip("'")
        return Refusal(place, f"no {key}", f"a {key}, which says what it is", f"Add {'.'.join([*path, key])}.")
    message = first["msg"]
    for prefix in _PREFIXES:
        message = message.removeprefix(prefix)
    return Refusal(place, repr(first.get("input")), message, "Correct the value.")


def nearest(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'train'? `, or nothing when no known word is close."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}? " if near else ""


def _written(loc: Sequence[int | str], content: Mapping[str, Any], missing: bool) -> list[str]:
    """The part of a pydantic location that stands in the file: names of unions' members and of expanded short forms do not."""
    path: list[str] = []
    here: Any = content
    for i, part in enumerate(loc):
        if _holds(here, part):
            here = here[part]
        elif not (missing and i == len(loc) - 1):
            continue
        path.append(str(part))
    return path


def _holds(here: Any, part: int | str) -> bool:
    if isinstance(here, Mapping):
        return part in here
    return isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> set[str]:
    """Names of the settings at a location, through optional, annotated and mapped fields."""
    here: list[type[BaseModel]] = [model]
    for key in path:
        deeper: list[type[BaseModel]] = []
        for candidate in here:
            if key in candidate.model_fields:
                deeper += models_in(candidate.model_fields[str(key)].annotation)
        here = deeper or here
    return {name for candidate in here for name in candidate.model_fields}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Classes of settings that an annotation names, through unions and containers."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in typing.get_args(annotation) for m in models_in(inner)]
