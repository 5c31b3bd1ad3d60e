"""What a benchmark is told and what it answers."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

PACKAGES = ("torch", "ray", "transformers", "mlflow", "trl", "accelerate")


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    folder: Path
    """Scratch: models, data and runs go here."""
    smoke: bool = False
    """Sizes that only show that the benchmark works; the numbers mean nothing."""
    rounds: int = 2
    """Times that each side runs; sides take turns, and medians are compared."""
    data: Path | None = None
    """Rows of a benchmark that reads real ones."""
    alternatives: bool = False
    """Also measure settings that no shipped recipe has."""
    methods: tuple[str, ...] = ()
    """Some of those that a benchmark compares; all when empty."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of a benchmark that trains to the end."""


@dataclass(frozen=True)
class Figure:
    """The answer of one benchmark, and the last line it prints."""

    name: str
    value: float
    unit: str
    against: str
    """The other side, in words; or that there is none."""
    target: str
    measured: Mapping[str, Any]
    """Machine, sizes, and the raw figures of every side and round."""

    def line(self) -> str:
        """The figure as one line of JSON."""
        return json.dumps(asdict(self))


class Measure(Protocol):
    """`measure` of a benchmark's module."""

    def __call__(self, settings: Settings) -> Figure: ...


def machine() -> dict[str, Any]:
    """What the numbers were measured on. `load` is the 1-minute average: above the cores, others were at work."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
