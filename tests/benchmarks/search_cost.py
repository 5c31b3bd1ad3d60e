"""What one teacher for a whole search saves: core-seconds of eight trials over those of the same eight runs, each with its teacher live.

The runs are the trials' own recipes, one command each. Both sides include everything: the interpreter, Ray, scoring, training, export.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from cluster.storage import Folder
from cluster.stores.files import StoreFiles
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine
from tests.benchmarks.searches import Metered, ended, filled, journal, metered, searched, sizes

NAME = "search-cost"


def measure(settings: Settings) -> Figure:
    """Core-seconds over core-seconds."""
    steps, trials = sizes(settings)
    teacher = filled(settings)
    search, folder = searched(settings, "none", 0)
    print(f"teacher {teacher.core_seconds:,.0f} and search {search.core_seconds:,.0f} core-seconds", flush=True)
    apart = [_apart(settings, folder, number) for number in range(trials)]
    in_steps = sum(t["metrics"]["seconds"] for t in ended(folder))
    return Figure(
        name=NAME,
        value=(teacher.core_seconds + search.core_seconds) / sum(m.core_seconds for m in apart),
        unit="core-seconds over core-seconds",
        against="the same eight recipes run apart, each with its teacher live",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "trials": trials,
            "steps": steps,
            "teacher": vars(teacher),
            "search": vars(search),
            "apart": [vars(m) for m in apart],
            "teacher_tokens_over_those_of_the_data": _scored(settings.folder / "runs", folder),
            "share_of_wall_time_outside_steps": {
                "live runs": [1 - _steps(_storage(settings) / f"live{n}") / m.wall_seconds for n, m in enumerate(apart)],
                "search": 1 - in_steps / search.wall_seconds,
            },
        },
    )


def _scored(storage: Path, search: Path) -> float:
    """Tokens that the teacher read for all trials, over those of all rows: of the store that was filled, and of the search itself."""
    (store,) = (storage / "signals").iterdir()
    (data,) = (storage / "data").glob("data-*/manifest.json")
    splits = json.loads(data.read_text(encoding="utf-8"))
    own = json.loads((search / "spent.json").read_text(encoding="utf-8"))["teacher_tokens"]
    read = sum(part.tokens for part in StoreFiles(Folder(str(store))).parts)
    return float((read + own) / (splits["train"]["tokens"] + splits["held_out"]["tokens"]))


def _storage(settings: Settings) -> Path:
    return settings.folder / "apart"


def _apart(settings: Settings, search: Path, number: int) -> Metered:
    """A trial's own recipe as a run with its teacher live."""
    run = yaml.safe_load((search.parent / f"{search.name}-{number:03d}" / "recipe.yaml").read_text(encoding="utf-8"))
    name = f"live{number}"
    took = metered(settings.folder / name, "run", {**run, "name": name, "signals": "live"}, _storage(settings))
    print(f"live run {number}: {took.wall_seconds:,.0f} s, {took.core_seconds:,.0f} core-seconds", flush=True)
    return took


def _steps(folder: Path) -> float:
    """Seconds of a run's steps."""
    return sum(values["step_seconds"] for values in journal(folder))
