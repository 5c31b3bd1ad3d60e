"""What the alarms remember of a run: its metrics in order, and means of them. Pure numbers; no files, no Ray."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

KEPT = ("rollout/", "eval/")
"""How the names of metrics begin that are always remembered."""

NORMAL_MEDIAN = 0.6745
"""Median of |x| for a standard normal x."""


@dataclass(frozen=True)
class Window:
    """The mean of a metric over steps that have it."""

    metric: str
    first: int
    last: int
    """Steps, both included."""
    mean: float
    error: float
    """Standard error of the mean, as if the steps were independent."""

    def __str__(self) -> str:
        return f"{self.mean:.4g} in steps {self.first} to {self.last}"

    def is_apart(self, other: Window, errors: float, least: float = 0.0) -> bool:
        """Whether the means differ by more than so many standard errors of their difference; that of a mean is at least `least`."""
        return abs(self.mean - other.mean) > errors * math.hypot(max(self.error, least), max(other.error, least))

    def is_better(self, other: Window) -> bool:
        """Whether the mean is better than that of another window of the same metric."""
        return self.mean < other.mean if smaller_is_better(self.metric) else self.mean > other.mean


def smaller_is_better(metric: str) -> bool:
    """Of losses, cross-entropies, perplexities and divergences; of all else, such as agreement or accuracy, more is better."""
    last = metric.rpartition("/")[2]
    return metric.startswith("loss") or last.endswith(("cross_entropy", "perplexity", "_kl"))


class History:
    """The metrics of a run's surviving lineage by name, each with its steps. Values that are not finite are left out."""

    def __init__(self, also: frozenset[str] = frozenset()):
        """`also` names metrics to be kept besides those of `KEPT`."""
        self._also = also
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step, later than what is known of each."""
        for name, value in values.items():
            if (name.startswith(KEPT) or name in self._also) and math.isfinite(value):
                self._steps.setdefault(name, array("q")).append(step)
                self._values.setdefault(name, array("d")).append(value)

    def forget_after(self, step: int) -> None:
        """The run goes on after `step`: what came later belongs to it no more."""
        for name, steps in self._steps.items():
            keep = bisect_right(steps, step)
            del steps[keep:], self._values[name][keep:]

    def names(self) -> list[str]:
        return [name for name, steps in self._steps.items() if steps]

    def start(self, metric: str, size: int) -> Window | None:
        """The first `size` values; None before twice as many are there, so that it never overlaps the latest."""
        return self._window(metric, slice(0, size)) if len(self._steps.get(metric, ())) >= 2 * size else None

    def latest(self, metric: str, size: int) -> Window | None:
        """The last `size` values; None while there are fewer."""
        return self._window(metric, slice(-size, None)) if len(self._steps.get(metric, ())) >= size else None

    def best(self, metric: str, size: int) -> Window | None:
        """The best of all windows of `size` values that end before the latest begins; None before there is one."""
        values = np.asarray(self._values.get(metric, ()), dtype=np.float64)
        if len(values) < 2 * size:
            return None
        means = np.lib.stride_tricks.sliding_window_view(values[:-size], size).mean(1)
        at = int(means.argmin() if smaller_is_better(metric) else means.argmax())
        return self._window(metric, slice(at, at + size))

    def jitter(self, metric: str) -> float:
        """Standard deviation of single values, from the median jump between two that follow each other: what few values of a window
        are sure to underestimate now and then."""
        jumps = np.diff(np.asarray(self._values.get(metric, ()), dtype=np.float64))
        return float(np.median(np.abs(jumps))) / (NORMAL_MEDIAN * math.sqrt(2)) if len(jumps) else 0.0

    def during(self, window: Window, metric: str) -> Window | None:
        """Of another metric over the same steps; None where they hold fewer than two values of it."""
        steps = self._steps.get(metric, array("q"))
        part = slice(bisect_left(steps, window.first), bisect_right(steps, window.last))
        return self._window(metric, part) if part.stop - part.start >= 2 else None

    def _window(self, metric: str, part: slice) -> Window:
        steps, values = self._steps[metric][part], self._values[metric][part]
        size = len(values)
        mean = sum(values) / size
        spread = sum((value - mean) ** 2 for value in values) / (size - 1)
        return Window(metric, steps[0], steps[-1], mean, math.sqrt(spread / size))
