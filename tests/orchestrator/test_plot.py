"""Curves of a run: a panel for what was decided, only where something was."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from orchestrator import plot
from orchestrator.journal import Journal, MetricRow

PLAIN = {"loss/kd": 1.0, "weight/kd": 0.9, "lr": 1e-3}


def run(folder: Path, *decided: dict[str, float]) -> list[MetricRow]:
    """A run whose steps have these values beside the plain ones, evaluated once."""
    rows = [MetricRow(step, 1, {**PLAIN, "loss/kd": 1.0 / step, **values}, 0.0) for step, values in enumerate(decided, start=1)]
    rows.append(MetricRow(len(rows), 1, {"eval/cross_entropy": 1.0, "eval/forward_kl": 0.5}, 0.0))
    Journal(folder).append(rows)
    return rows


def width(folder: Path) -> int:
    return int(matplotlib.image.imread(plot.plot_curves({"student": folder}, folder / plot.CURVES)).shape[1])


def test_what_moved_is_a_decision_and_what_stood_still_is_none(tmp_path: Path) -> None:
    shares = [{"curriculum/share/code": s, "control/t": s, "curriculum/open": 1.0} for s in (0.2, 0.4)]
    assert plot._moved(run(tmp_path, *shares)) == ["control/t"]


@pytest.mark.parametrize(
    ("decided", "panels"),
    [
        (({}, {}), 2),
        (({"control/t": 0.1}, {"control/t": 0.2}), 3),
        (({"weight/kd": 0.9}, {"weight/kd": 0.5}), 3),
        (({"curriculum/share/code": 0.1}, {"curriculum/share/code": 0.2}), 3),
        (({"curriculum/share/code": 0.1, "control/t": 0.1}, {"curriculum/share/code": 0.2, "control/t": 0.2}), 4),
    ],
)
def test_each_kind_of_curve_has_a_panel(tmp_path: Path, decided: tuple[dict[str, float], ...], panels: int) -> None:
    run(tmp_path, *decided)
    assert width(tmp_path) == pytest.approx(panels * 5.5 * 110, rel=0.01)
