"""What a finished run leaves behind, and the comparison it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RECIPE = "recipe.yaml"
"""The recipe of a run, in its folder."""
RESULT = "result.json"
"""What a finished run leaves in its folder; its presence says that the run is finished."""


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
    curves: str
    """PNG of training and held-out curves, the control's beside them."""
    comparison: tuple[Row, ...] = ()
