"""Pictures of a search, as PNG files: curves, parallel coordinates, importance, quality against cost, and what sharing saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from orchestrator.search.book import CONTROL, Trial, front
from orchestrator.search.settings import Domain, Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110
COLOURS = {"finished": "C0", "paused": "C1", "stopped": "C1", "failed": "C3", "running": "0.6"}


@contextmanager
def _drawn(to: Path, width: float = 8.0, height: float = 4.2) -> Iterator[Axes]:
    """Axes that are saved as `to`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    yield axes
    figure.savefig(to, dpi=DPI)
    plt.close(figure)


def draw_curves(trials: Sequence[Trial], curve: Callable[[int], Mapping[int, float]], objective: Objective, to: Path) -> Path:
    """The first objective of every trial by step; those that were stopped end early."""
    with _drawn(to) as axes:
        for trial in trials:
            points = curve(trial.number)
            colour, line = ("black", "--") if trial.number == CONTROL else (COLOURS[trial.outcome], "-")
            if points:
                axes.plot(list(points), list(points.values()), marker="o", markersize=3, color=colour, linestyle=line)
                axes.annotate(trial.label, (max(points), points[max(points)]), fontsize=7, xytext=(3, 0), textcoords="offset points")
        axes.margins(x=0.12)
        axes.set(title="Held-out rows (orange: paused or stopped; dashed: without teacher)", xlabel="step", ylabel=objective.metric)
        axes.grid(alpha=0.3)
    return to


def draw_parallel(trials: Sequence[Trial], space: Mapping[str, Domain], objective: Objective, to: Path) -> Path:
    """One line for each trial through its value of every path, scaled to the path's own range; the darkest is the best."""
    scored = [(s[0], t) for t in trials if t.number != CONTROL and (s := t.scores((objective,)))]
    values = sorted(score for score, _ in scored)
    with _drawn(to, width=max(6.0, 1.6 * (len(space) + 1))) as axes:
        for score, trial in scored:
            heights = [_height(domain, trial.point[path]) if path in trial.point else None for path, domain in space.items()]
            rank = _scaled(score, values[0], values[-1])
            line = [h if h is not None else float("nan") for h in heights] + [rank]
            axes.plot(line, color=(0.12, 0.35, 0.65), alpha=1.0 - 0.85 * rank, marker="o", markersize=3)
        names = [f"{path}\n{_ends(domain)}" for path, domain in space.items()]
        last = f"{objective.metric}\n{values[0] * objective.sign:.4g} to {values[-1] * objective.sign:.4g}" if values else objective.metric
        axes.set_xticks(range(len(space) + 1), [*names, last], fontsize=7)
        axes.set(title="Trials (dark: better)", yticks=[0, 1], yticklabels=["first", "last"])
        axes.grid(axis="x", alpha=0.5)
    return to


def draw_importance(shares: Mapping[str, float], of: str, to: Path) -> Path:
    """How much of the objective's variation each path explains, among trials that `of` names."""
    with _drawn(to, height=1.2 + 0.4 * max(1, len(shares))) as axes:
        ordered = sorted(shares.items(), key=lambda item: item[1])
        axes.barh([path for path, _ in ordered], [share for _, share in ordered])
        axes.set(title=f"Importance (fANOVA over {of}; a hint where these are few)", xlim=(0, 1))
    return to


def draw_front(trials: Sequence[Trial], objectives: tuple[Objective, ...], to: Path) -> Path:
    """The first objective against the second; against trained tokens where there is one only. The front is joined."""
    across = objectives[1] if len(objectives) > 1 else Objective(metric="tokens")
    pair = (objectives[0], across)
    with _drawn(to) as axes:
        for trial in trials:
            if all(o.metric in trial.metrics for o in pair):
                y, x = (trial.metrics[o.metric] for o in pair)
                control = trial.number == CONTROL
                axes.scatter(x, y, color="black" if control else COLOURS[trial.outcome], marker="s" if control else "o", s=22)
                axes.annotate(trial.label, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
        line = sorted((t.metrics[across.metric], t.metrics[pair[0].metric]) for t in front(list(trials), pair))
        axes.plot([x for x, _ in line], [y for _, y in line], color="C2", label="front")
        axes.margins(x=0.12)
        axes.set(title="Quality against cost", xlabel=across.metric, ylabel=pair[0].metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return to


def draw_cost(costs: Mapping[str, Mapping[str, float]], to: Path) -> Path:
    """Seconds by part, of this search and of the same trials each with a teacher of its own."""
    with _drawn(to, height=2.6) as axes:
        for row, parts in costs.items():
            left = 0.0
            for number, (name, seconds) in enumerate(parts.items()):
                axes.barh(row, seconds, left=left, color=f"C{number}", label=name if row == next(iter(costs)) else None)
                left += seconds
        axes.set(title="Seconds of processes, one after another", xlabel="seconds")
        axes.legend(fontsize=8)
    return to


def _height(domain: Domain, value: JsonValue) -> float:
    if domain.choice is not None:
        return _scaled(domain.choice.index(value), 0, len(domain.choice) - 1)
    assert isinstance(value, int | float)
    scale: Callable[[float], float] = math.log if domain.log_uniform is not None else float
    return _scaled(scale(value), *map(scale, domain.bounds))


def _scaled(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.0


def _ends(domain: Domain) -> str:
    return f"{len(domain.choice)} values" if domain.choice is not None else f"{domain.bounds[0]:g} to {domain.bounds[1]:g}"
