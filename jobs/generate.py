"""`distill generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.run import cluster_file
from orchestrator.display import Display
from orchestrator.generate import generate


def run_generate(recipe: Path, overrides: Sequence[str], cluster: Path | None, verbose: bool) -> None:
    """Fills the stores of a recipe and says what they hold and what to type next."""
    kept = generate(recipe, overrides, cluster_file(cluster), Display(verbose))
    table = Table(title="Signals kept", title_justify="left")
    table.add_column("teacher", no_wrap=True)
    for name in ("rows", "tokens\nkept", "tokens\nscored now", "seconds", "bytes a\ntoken"):
        table.add_column(name, justify="right", no_wrap=True)
    for k in kept:
        numbers = (f"{k.rows:,}", f"{k.loss_tokens:,}", f"{k.scored_tokens:,}", f"{k.seconds:,.1f}", f"{k.bytes_per_token:,.1f}")
        table.add_row(k.teacher, *numbers)
    out = Console(highlight=False)
    out.print(table)
    for k in kept:
        out.print(f"Store    {k.folder}", soft_wrap=True)
    out.print(f"Next     distill run {recipe} {' '.join(overrides)}".rstrip(), soft_wrap=True)
