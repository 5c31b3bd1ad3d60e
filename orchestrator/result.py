"""What a finished run leaves behind, and the comparison it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.plan import Plan
from orchestrator.saved_models import count_parameters


@dataclass(frozen=True)
class Row:
    """One line of a comparison on the held-out rows; None where there is nothing to compare with."""

    who: str
    cross_entropy: float | None
    """Nats per token."""
    forward_kl: float | None
    """KL(teacher || this model) in nats per token, on the teacher's kept tokens and one bucket for the rest."""
    top1_agreement: float | None
    """Share of tokens on which teacher and model prefer the same one."""
    parameters: int | None
    seconds: float
    """Wall time of the training steps; of scoring for a teacher."""
    tokens_per_second: float


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind."""

    name: str
    folder: str
    steps: int
    metrics: Mapping[str, float]
    """Held-out metrics of the exported student, and totals of the run."""
    student: str
    """Folder of the exported student."""
    tracking_uri: str
    mlflow_run_id: str
    page: str
    """Where a person sees the run in MLflow: an address, or the command that serves one."""
    comparison: tuple[Row, ...] = ()


def student_row(plan: Plan, who: str, metrics: Mapping[str, float], ledger: Ledger, student: Path) -> Row:
    """The line of a trained student."""
    return Row(
        who=who,
        cross_entropy=metrics.get("eval/cross_entropy"),
        forward_kl=metrics.get("eval/forward_kl"),
        top1_agreement=metrics.get("eval/top1_agreement"),
        parameters=count_parameters(student),
        seconds=ledger.seconds,
        tokens_per_second=ledger.tokens_per_second,
    )


def teacher_rows(plan: Plan, metrics: Mapping[str, float], ledger: Ledger) -> list[Row]:
    """One line for every teacher that scored held-out rows."""
    rows = []
    for name, config in plan.endpoints.items():
        seconds = ledger.score_seconds.get(name, 0.0)
        rows.append(
            Row(
                who=name,
                cross_entropy=metrics.get(f"eval/teacher_cross_entropy/{name}"),
                forward_kl=0.0,
                top1_agreement=1.0,
                parameters=count_parameters(Path(model)) if (model := getattr(config, "model", None)) else None,
                seconds=seconds,
                tokens_per_second=ledger.tokens / seconds if seconds else 0.0,
            )
        )
    return rows
