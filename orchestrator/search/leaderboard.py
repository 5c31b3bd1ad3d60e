"""What a person sees of a search: the trials so far, the best first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.live import Live
from rich.table import Table

from orchestrator.display import console
from orchestrator.search.book import CONTROL, EARLY, Trial
from orchestrator.search.plan_text import short
from orchestrator.search.settings import Objective


class Leaderboard:
    """A live table on a terminal, a line for every trial's end elsewhere."""

    def __init__(self, objectives: tuple[Objective, ...], paths: Sequence[str]):
        self._objectives, self._paths = objectives, tuple(paths)
        self._console = console(stderr=True)
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Around the trials."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def tell(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """A trial has moved."""
        if self._live is not None:
            self._live.update(self.table(trials), refresh=True)
        elif trial.outcome != "running":
            values = ", ".join(f"{o.metric} {_number(trial.metrics.get(o.metric))}" for o in self._objectives)
            point = ", ".join(f"{p} {short(v)}" for p, v in trial.point.items())
            words = f" ({trial.words})" if trial.words else ""
            self._console.print(f"trial {trial.label} {trial.outcome} at step {trial.step}: {values}; {point}{words}", soft_wrap=True)

    def table(self, trials: Sequence[Trial]) -> Table:
        """All trials, the best first, those without a value last."""
        table = Table(title="Trials", title_justify="left")
        table.add_column("trial", no_wrap=True)
        for objective in self._objectives:
            table.add_column(objective.metric.removeprefix("eval/").replace("_", " "), justify="right", no_wrap=True)
        for path in self._paths:
            table.add_column(path.replace(".", ".\u200b"), justify="right", overflow="fold")
        for name in ("step", "tokens", "seconds", "state"):
            table.add_column(name, justify="right", no_wrap=True)
        for trial in sorted(trials, key=self._rank):
            table.add_row(*self._row(trial), style="dim" if trial.outcome in (*EARLY, "failed") else "")
        return table

    def _rank(self, trial: Trial) -> tuple[float, int]:
        scores = trial.scores(self._objectives[:1])
        return (scores[0] if scores and trial.outcome != "failed" else math.inf, trial.number)

    def _row(self, trial: Trial) -> list[str]:
        values = [_number(trial.metrics.get(o.metric)) for o in self._objectives]
        point = ["" if trial.number == CONTROL else short(trial.point[p]) if p in trial.point else "-" for p in self._paths]
        costs = [f"{trial.metrics.get('tokens', 0):,.0f}", f"{trial.metrics.get('seconds', 0):,.1f}"]
        return [trial.label, *values, *point, f"{trial.step:,}", *costs, trial.outcome]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"
