"""`distill strategies`: what can be taught, with settings, defaults and docs from the strategies' own classes."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from jobs.settings import first_sentence, show
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
        show(name, strategy_settings(name, "distill strategies"), "strategy.")


def show_objectives(name: str | None) -> None:
    """Lists every objective, or one with its settings. `Refusal` names the nearest known one."""
    if name is None:
        _list("objective", OBJECTIVES, "distill objectives NAME")
    elif name not in OBJECTIVES:
        do = f"{nearest(name, OBJECTIVES)}`distill objectives` lists them."
        raise Refusal("distill objectives", repr(name), f"one of {', '.join(OBJECTIVES)}", do)
    else:
        show(name, OBJECTIVES[name], "")


def _list(what: str, known: Mapping[str, type[Settings]], more: str) -> None:
    out = console()
    table = Table(what, "what it does", box=None, pad_edge=False)
    for type_name, config in sorted(known.items()):
        table.add_row(Text(type_name, style="bold"), Text(first_sentence(config)))
    out.print(table)
    out.print(f"\nSettings of one: {more}")
