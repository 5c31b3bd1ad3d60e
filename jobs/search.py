"""`distill search`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.run import cluster_file
from orchestrator.display import Display, console
from orchestrator.search.leaderboard import Leaderboard
from orchestrator.search.result import SearchResult


def show_search(recipe: Path, overrides: Sequence[str], cluster: Path | None) -> None:
    """Checks a search and prints what it would try, share and cost."""
    from orchestrator.search.door import search_plan
    from orchestrator.search.drive import cluster_content
    from orchestrator.search.plan_text import search_text

    plan = search_plan(recipe, overrides, cluster_content(cluster_file(cluster)))
    console().print(search_text(plan), soft_wrap=True)


def start_search(recipe: Path, overrides: Sequence[str], cluster: Path | None, verbose: bool) -> None:
    """Searches, and says what was found and what to type next."""
    from orchestrator.search.drive import search

    _show(search(recipe, overrides, cluster_file(cluster), Display(verbose)))


def resume_search(folder: str, overrides: Sequence[str], cluster: Path | None, verbose: bool) -> None:
    """Goes on with a search that was interrupted, or with a larger budget."""
    from orchestrator.search import drive

    _show(drive.resume_search(folder, overrides, cluster_file(cluster), Display(verbose)))


def _show(result: SearchResult) -> None:
    out = console()
    out.print(Leaderboard(result.objectives, result.paths).table(result.trials))
    if len(result.objectives) > 1:
        out.print(f"Front    trials {', '.join(t.label for t in result.front)}: none is beaten in everything", soft_wrap=True)
    out.print(f"Best     trial {result.best.label}: {result.best_recipe}", soft_wrap=True)
    out.print(f"Search   {result.folder}", soft_wrap=True)
    out.print(f"MLflow   {result.page}", soft_wrap=True)
    out.print(f"Report   {result.report}", soft_wrap=True)
    out.print(f"Next     distill run {result.best_recipe}", soft_wrap=True)
