"""Curves of a finished run as a PNG, read from the journals of the run and of its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.journal import Journal, MetricRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"
SMOOTHED_STEPS = 15
SHARE = "curriculum/share/"
"""Before a domain: its share of a step's rows."""
DECISIONS = ("control/", "curriculum/", "weight/")
"""Before what controllers, curricula and schedules decide."""


def plot_curves(runs: Mapping[str, Path], to: Path) -> Path:
    """Training loss terms (running mean) and held-out metrics against steps; of a run that draws by domains, also the share that each
    gave (running mean); and whatever its controllers, curriculum and schedules moved. `runs` maps a name to a run's folder, the run
    itself first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    journals = {name: list(Journal(folder).rows()) for name, folder in runs.items()}
    shares = sorted({metric for rows in journals.values() for row in rows for metric in row.values if metric.startswith(SHARE)})
    decisions = _moved(next(iter(journals.values())))
    columns = 2 + bool(shares) + bool(decisions)
    figure, (left, right, *more) = plt.subplots(1, columns, figsize=(5.5 * columns, 4.2), layout="constrained")
    for number, (name, rows) in enumerate(journals.items()):
        _draw(left, rows, name, f"C{number}", dict(zip(_terms(rows), ("-", "--", ":", "-."), strict=False)), smooth=True)
        _draw(right, rows, name, f"C{number}", {"eval/cross_entropy": "-o", "eval/forward_kl": "--o"}, smooth=False)
    for name, value in _teachers(next(iter(runs.values()))).items():
        right.axhline(value, color="grey", linestyle=":", label=f"{name}: cross entropy")
    left.set(title=f"Training (mean of {SMOOTHED_STEPS} steps)", xlabel="step", ylabel="nats per token")
    right.set(title="Held-out rows", xlabel="step", ylabel="nats per token")
    if decisions:
        _decided(more[-1], next(iter(journals.values())), decisions)
    for axes in more[:1] if shares else ():
        for number, rows in enumerate(journals.values()):
            for colour, metric in enumerate(shares):
                _draw(axes, rows, "share", f"C{colour}", {metric: ("-", "--", ":")[number % 3]}, smooth=True)
        axes.set(title="Domains of the rows", xlabel="step", ylabel="share of a step's rows", ylim=(0, 1))
    for axes in (left, right, *more):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(to, dpi=110)
    plt.close(figure)
    return to


def _moved(rows: Sequence[MetricRow]) -> list[str]:
    """Decisions that were not the same at every step, other than shares."""
    seen: dict[str, set[float]] = {}
    for row in rows:
        for metric, value in row.values.items():
            if metric.startswith(DECISIONS) and not metric.startswith(SHARE):
                seen.setdefault(metric, set()).add(value)
    return sorted(metric for metric, values in seen.items() if len(values) > 1)


def _decided(axes: Axes, rows: Sequence[MetricRow], decisions: Sequence[str]) -> None:
    for number, metric in enumerate(decisions):
        points = [(r.step, r.values[metric]) for r in rows if metric in r.values]
        axes.step(*zip(*points, strict=True), where="post", color=f"C{number}", label=metric)
    axes.set(title="What was decided", xlabel="step")


def _draw(axes: Axes, rows: Sequence[MetricRow], name: str, colour: str, styles: Mapping[str, str], smooth: bool) -> None:
    for metric, style in styles.items():
        points = [(r.step, r.values[metric]) for r in rows if metric in r.values]
        if points:
            steps, values = zip(*points, strict=True)
            label = f"{name}: {metric.rpartition('/')[2].replace('_', ' ')}"
            axes.plot(steps, _smoothed(values) if smooth else values, style, color=colour, label=label)


def _terms(rows: Sequence[MetricRow]) -> list[str]:
    """`loss/...` metrics of the first step; their weighted sum alone says little."""
    return sorted(m for r in rows[:1] for m in r.values if m.startswith("loss/"))


def _teachers(folder: Path) -> dict[str, float]:
    prefix = "eval/teacher_cross_entropy/"
    found = {m.removeprefix(prefix): v for r in Journal(folder).rows() for m, v in r.values.items() if m.startswith(prefix)}
    return {name: value for name, value in found.items() if "/" not in name}


def _smoothed(values: Sequence[float]) -> list[float]:
    return [sum(window := values[max(0, i - SMOOTHED_STEPS + 1) : i + 1]) / len(window) for i in range(len(values))]
