"""`distill plan` and `distill run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator import run as runs
from orchestrator.config import load_job
from orchestrator.display import Display, console

CLUSTER = Path("ray_config.yaml")


def show_plan(recipe: Path, overrides: Sequence[str], cluster: Path | None) -> None:
    """Checks and prints; `Refusal` says what is wrong."""
    from orchestrator.plan import make_plan, plan_text

    job = load_job(recipe, overrides, cluster_file(cluster))
    console().print(plan_text(make_plan(job, recipe.stem)), soft_wrap=True)


def start_run(recipe: Path, overrides: Sequence[str], cluster: Path | None, verbose: bool) -> None:
    """Runs a recipe and says where everything is."""
    display = Display(verbose)
    display.result(runs.distill(recipe, overrides, cluster_file(cluster), display=display))


def resume_run(folder: str, overrides: Sequence[str], cluster: Path | None, verbose: bool) -> None:
    """Goes on from a run's last committed checkpoint."""
    display = Display(verbose)
    display.result(runs.resume(folder, overrides, cluster_file(cluster), display=display))


def cluster_file(given: Path | None) -> Path | None:
    """The cluster settings to use: those named, else `ray_config.yaml` here, else none."""
    return given or (CLUSTER if CLUSTER.exists() else None)
