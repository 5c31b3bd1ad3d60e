"""`distill settings`: what a recipe may say, with defaults and docs from the recipe's own classes."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table
from rich.text import Text

from orchestrator.config import Job, RunConfig
from orchestrator.display import console
from orchestrator.errors import Refusal
from orchestrator.explain import models_in, nearest
from strategies.schedule import Ramp

COMMAND = "distill settings"


def show_settings(path: str | None) -> None:
    """The settings at a dotted path of a recipe, all sections without one. `Refusal` names the nearest known one."""
    keys = path.split(".") if path else []
    here: Sequence[type[BaseModel]] = [Job if keys[:1] == ["search"] else RunConfig]
    for number, key in enumerate(keys):
        below = _below(here, key, ".".join(keys[:number]))
        if not below:
            keys = keys[:number]  # a setting without settings of its own is shown among its neighbours
            break
        here = below
    place = ".".join(keys)
    if len(here) == 1:
        show(place or "recipe", here[0], f"{place}." if place else "", COMMAND)
        return
    table = Table(place, "what it is", box=None, pad_edge=False)
    for model in here:
        table.add_row(Text(_tag(model) or model.__name__, style="bold"), Text(first_sentence(model)))
    console().print(table)
    console().print(f"\nSettings of one: {COMMAND} {place}.NAME")


def show(name: str, config: type[BaseModel], prefix: str, deeper: str | None = None) -> None:
    """Settings of one class. `deeper` is the command that shows a section's own settings by its path."""
    out = console()
    out.print(Text(name, style="bold"))
    for paragraph in (inspect.getdoc(config) or "").split("\n\n"):
        out.print(Text(f"{' '.join(paragraph.split())}\n"))
    table = Table("setting", "default", "meaning", box=None, pad_edge=False)
    for field, info in config.model_fields.items():
        cells = (f"{prefix}{field}", _default(info, f"{deeper} {prefix}{field}" if deeper else None), meaning(config, field))
        table.add_row(*(Text(cell) for cell in cells))
    out.print(table)


def meaning(config: type[BaseModel], field: str) -> str:
    """The sentence under a setting, else that of the class it comes from, else what a section says of itself."""
    info = config.model_fields[field]
    inner = models_in(info.annotation)
    said = [c.model_fields[field].description for c in config.__mro__ if issubclass(c, BaseModel) and field in c.model_fields]
    text = next((s for s in said if s), None) or (first_sentence(inner[0]) if len(inner) == 1 else "")
    return " ".join(f"{text} {'May be a schedule.' if Ramp in inner else ''}".split())


def first_sentence(config: type[BaseModel]) -> str:
    return (inspect.getdoc(config) or "").partition("\n\n")[0].replace("\n", " ")


def _default(info: FieldInfo, deeper: str | None) -> str:
    value = "required" if info.is_required() else info.get_default(call_default_factory=True)
    inner = models_in(info.annotation)
    if deeper is None or not inner or Ramp in inner:
        return value if info.is_required() else repr(value)
    see = f"see {deeper}"
    return see if isinstance(value, BaseModel) else f"{value}; {see}"


def _below(models: Sequence[type[BaseModel]], key: str, place: str) -> list[type[BaseModel]]:
    """The classes of settings under a key: those of a field, or the one of several that has the key as its type or engine."""
    fields = [m.model_fields[key].annotation for m in models if key in m.model_fields]
    if fields:
        return list(dict.fromkeys(inner for annotation in fields for inner in models_in(annotation)))
    tagged = [m for m in models if _tag(m) == key]
    if tagged:
        return tagged
    known = sorted({*(name for m in models for name in m.model_fields), *(tag for m in models if (tag := _tag(m)))})
    raise Refusal(
        f"{COMMAND} {place}".rstrip(), repr(key), f"one of {', '.join(known)}", f"{nearest(key, known)}`{COMMAND}` lists sections."
    )


def _tag(model: type[BaseModel]) -> str | None:
    """What tells it apart from others in its place."""
    found = [typing.get_args(model.model_fields[name].annotation) for name in ("engine", "type") if name in model.model_fields]
    return next((str(values[0]) for values in found if len(values) == 1), None)
