"""`distill strategies`: what can be taught, with settings, defaults and docs from the strategies' own classes."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from orchestrator.config import strategy_settings
from strategies import known_strategies
from strategies.core import StrategyConfig


def show_strategies(name: str | None) -> None:
    """Lists every strategy, or one with its settings."""
    console = Console()
    if name is None:
        table = Table("strategy", "what it does", box=None, pad_edge=False)
        for type_name, config in sorted(known_strategies().items()):
            table.add_row(f"[bold]{type_name}[/]", _first_sentence(config))
        console.print(table)
        console.print("\nSettings of one: distill strategies NAME", highlight=False)
        return
    config = strategy_settings(name, "distill strategies")
    console.print(f"[bold]{name}[/]\n{inspect.getdoc(config)}\n", highlight=False)
    table = Table("setting", "default", "meaning", box=None, pad_edge=False)
    for field, info in config.model_fields.items():
        table.add_row(f"strategy.{field}", repr(info.default), info.description or "")
    console.print(table)


def _first_sentence(config: type[StrategyConfig]) -> str:
    return (inspect.getdoc(config) or "").partition("\n\n")[0].replace("\n", " ")
