"""`distill stores`: what is kept of teachers' answers, whether it is sound, and room made."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.config import ClusterConfig
from jobs.run import cluster_file
from orchestrator.config import load_cluster
from orchestrator.display import console
from orchestrator.errors import Refusal
from orchestrator.store_list import Listed, listed, prune, verify


def show_stores(action: str, names: list[str], cluster: Path | None, unfinished: bool) -> None:
    """Lists, verifies or prunes the stores below the storage folder, or those whose folders are named."""
    config: ClusterConfig = load_cluster(cluster_file(cluster))
    found = listed(config, names)
    out = console()
    if action == "verify":
        damaged = [s for s in found if not _verified(s, out)]
        if damaged:
            do = f"distill stores prune {' '.join(s.folder.root for s in damaged)}"
            raise Refusal("signal stores", f"{len(damaged)} damaged", "bytes as they were written", do)
    elif action == "prune":
        _prune(found, bool(names), unfinished, out)
    else:
        out.print(_table(found) if found else "No stores. `distill generate RECIPE` makes one.")


def _verified(store: Listed, out: Console) -> bool:
    problems = verify(store)
    out.print(f"{store.folder.root}: " + ("; ".join(problems) if problems else f"sound, {store.size:,} bytes"), soft_wrap=True)
    return not problems


def _prune(found: list[Listed], named: bool, unfinished: bool, out: Console) -> None:
    chosen = found if named else [s for s in found if unfinished and s.state != "finished"]
    if not chosen:
        out.print("Nothing to remove: name the folders of stores, or give --unfinished.")
    for store in chosen:
        prune(store)
        out.print(f"Removed {store.folder.root} ({store.size:,} bytes)", soft_wrap=True)


def _table(found: list[Listed]) -> Table:
    table = Table(title="Stores of what teachers said", title_justify="left")
    for name in ("store", "state"):
        table.add_column(name)
    for name in ("rows", "tokens", "MiB", "bytes a\ntoken"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in found:
        per_token = f"{s.size / s.loss_tokens:,.1f}" if s.loss_tokens else "-"
        name = s.folder.root.rpartition("/")[2]
        table.add_row(f"{name}\n  {s.asked}", s.state, f"{s.rows:,}", f"{s.loss_tokens:,}", f"{s.size / 2**20:,.1f}", per_token)
    return table
