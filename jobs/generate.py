"""`distill generate`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.run import cluster_file
from orchestrator.display import Display, console
from orchestrator.generate import Generated, generate


def run_generate(recipe: Path, overrides: Sequence[str], cluster: Path | None, verbose: bool) -> None:
    """Fills the stores of a recipe and says what they hold and what to type next."""
    generated = generate(recipe, overrides, cluster_file(cluster), Display(verbose))
    out = console()
    if generated.texts:
        _show_texts(generated, out)
    if generated.signals:
        _show_signals(generated, out)
    out.print(f"Next     {shlex.join(['distill', 'run', str(recipe), *overrides])}", soft_wrap=True)


def _show_signals(generated: Generated, out: Console) -> None:
    names = ("rows", "tokens\nkept", "tokens\nscored now", "seconds", "bytes a\ntoken")
    table = _table("Signals kept", names)
    for k in generated.signals:
        numbers = (f"{k.rows:,}", f"{k.loss_tokens:,}", f"{k.scored_tokens:,}", f"{k.seconds:,.1f}", f"{k.bytes_per_token:,.1f}")
        table.add_row(k.teacher, *numbers)
    out.print(table)
    for k in generated.signals:
        out.print(f"Store    {k.folder}", soft_wrap=True)


def _show_texts(generated: Generated, out: Console) -> None:
    table = _table("Text written", ("texts", "tokens", "tokens\nwritten now", "seconds"))
    for w in generated.texts:
        table.add_row(w.teacher, f"{w.texts:,}", f"{w.tokens:,}", f"{w.written_tokens:,}", f"{w.seconds:,.1f}")
    out.print(table)
    for w in generated.texts:
        out.print(f"Store    {w.folder}", soft_wrap=True)
    if (selected := generated.selected) is not None:
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in selected.rejected.items())
        out.print(f"Kept     {selected.kept:,} of {selected.written:,} texts, in {selected.rows_file}", soft_wrap=True)
        if rejected:
            out.print(f"Rejected {rejected}, in {selected.rejected_file}", soft_wrap=True)


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("teacher", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table
