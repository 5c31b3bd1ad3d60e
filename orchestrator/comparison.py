"""The lines of a run's closing comparison: every teacher, the student, the control."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.ledger import Totals
from orchestrator.plan import Plan
from orchestrator.result import Row
from orchestrator.saved_models import count_parameters


def student_row(plan: Plan, who: str, metrics: Mapping[str, float], totals: Totals, student: Path) -> Row:
    """The line of a trained student."""
    return Row(
        who=who,
        cross_entropy=metrics.get("eval/cross_entropy"),
        forward_kl=metrics.get("eval/forward_kl"),
        top1_agreement=metrics.get("eval/top1_agreement"),
        parameters=count_parameters(student),
        seconds=totals.seconds,
        tokens_per_second=totals.tokens_per_second,
    )


def teacher_rows(plan: Plan, metrics: Mapping[str, float], totals: Totals) -> list[Row]:
    """One line for every teacher that scored held-out rows."""
    rows = []
    scoring = {taught.endpoint: taught for taught in plan.measured.values()}
    for name, config in ((n, c) for n, c in plan.endpoints.items() if n in scoring):
        seconds, whole = totals.score_seconds.get(name, 0.0), "expectation" in scoring[name].gives
        rows.append(
            Row(
                who=name,
                cross_entropy=metrics.get(f"eval/teacher_cross_entropy/{name}"),
                forward_kl=0.0 if whole else None,
                top1_agreement=1.0 if whole else None,
                parameters=count_parameters(Path(saved.model)) if (saved := config.saved_model) else None,
                seconds=seconds,
                tokens_per_second=totals.tokens / seconds if seconds else 0.0,
            )
        )
    return rows
