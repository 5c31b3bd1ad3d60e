"""`distill doctor`: is everything there that a run needs, and what to do when not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig
from cluster.health import Finding, checks
from jobs.run import cluster_file
from orchestrator.config import load_cluster
from orchestrator.display import console
from orchestrator.errors import Refusal
from orchestrator.roundtrip import roundtrip

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def examine(cluster: Path | None) -> int:
    """Prints what every check finds; 1 when one failed."""
    config = load_cluster(cluster_file(cluster))
    found = [check() for check in (*checks(config), mlflow_of(config))]
    table = Table(title="distill doctor", title_justify="left")
    for name in ("check", "state", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in found:
        state = Text(finding.state, style=STYLES[finding.state])
        table.add_row(finding.name, state, finding.says, finding.do)
    console().print(table)
    return int(any(finding.state == "failed" for finding in found))


def mlflow_of(config: ClusterConfig) -> Callable[[], Finding]:
    """The check that a run can be written to MLflow and read again."""

    def check() -> Finding:
        try:
            page = roundtrip(config.tracking_uri, config.mlflow.experiment)
        except Refusal as error:
            return Finding("MLflow", "failed", f"{error.where}: {error.got}", error.do)
        return Finding("MLflow", "ok", f"wrote, read and deleted a run in experiment {config.mlflow.experiment!r}: {page}")

    return check
