"""`distill strategies`: what can be taught, with settings, defaults and docs from the strategies' own classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from orchestrator.config import strategy_settings
from orchestrator.display import console
from orchestrator.errors import Refusal
from orchestrator.explain import nearest
from strategies import known_strategies
from strategies.core import Settings
from strategies.objectives import OBJECTIVES


def show_strategies(name: str | None) -> None:
    """Lists every strategy, or one with its settings."""
    if name is None:
        _list("strategy", known_strategies(), "distill strategies NAME")
    else:
        _show(name, strategy_settings(name, "distill strategies"), "strategy.")


def show_objectives(name: str | None) -> None:
    """Lists every objective, or one with its settings. `Refusal` names the nearest known one."""
    if name is None:
        _list("objective", OBJECTIVES, "distill objectives NAME")
    elif name not in OBJECTIVES:
        do = f"{nearest(name, OBJECTIVES)}`distill objectives` lists them."
        raise Refusal("distill objectives", repr(name), f"one of {', '.join(OBJECTIVES)}", do)
    else:
        _show(name, OBJECTIVES[name], "")


def _list(what: str, known: Mapping[str, type[Settings]], more: str) -> None:
    out = console()
    table = Table(what, "what it does", box=None, pad_edge=False)
    for type_name, config in sorted(known.items()):
        table.add_row(Text(type_name, style="bold"), Text(_first_sentence(config)))
    out.print(table)
    out.print(f"\nSettings of one: {more}")


def _show(name: str, config: type[Settings], prefix: str) -> None:
    out = console()
    out.print(Text(name, style="bold"))
    for paragraph in (inspect.getdoc(config) or "").split("\n\n"):
        out.print(Text(f"{' '.join(paragraph.split())}\n"))
    table = Table("setting", "default", "meaning", box=None, pad_edge=False)
    for field, info in config.model_fields.items():
        default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
        table.add_row(*(Text(cell) for cell in (f"{prefix}{field}", default, info.description or "")))
    out.print(table)


def _first_sentence(config: type[Settings]) -> str:
    return (inspect.getdoc(config) or "").partition("\n\n")[0].replace("\n", " ")
