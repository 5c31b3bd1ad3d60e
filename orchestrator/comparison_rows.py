"""Which rows models are compared on, and which models a person means by a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Folder
from orchestrator.authored import measured_data
from orchestrator.checkpoint import SNAPSHOT
from orchestrator.comparable import positions_of, tokenizer_of
from orchestrator.config import load_job
from orchestrator.data import prepare
from orchestrator.errors import Refusal
from orchestrator.models import load_tokenizer
from orchestrator.result import RECIPE
from orchestrator.rows import Rows
from orchestrator.settings import DataConfig

CACHE = "runs/data"
MOST_TOKENS = 1024
"""Longest row of a source given without a recipe, unless a model has fewer positions."""


@dataclass(frozen=True)
class ChosenRows:
    """Rows to compare on."""

    rows: Rows
    indices: NDArray[np.int64]
    what: str
    """In words."""


def rows_of_recipe(recipe: Path, overrides: Sequence[str], cluster: Path | Mapping[str, Any] | None) -> ChosenRows:
    """The held-out rows of a recipe: the very ones that its runs are evaluated on. The recipe in a run's folder has them
    beside that folder."""
    job = load_job(recipe, overrides, cluster)
    storage = recipe.absolute().parents[1] if (recipe.parent / SNAPSHOT).is_file() else Folder.of(job.cluster.storage).local
    cache = storage / "data" if storage else Path(CACHE)
    tokenizer = load_tokenizer(job.run.student)
    data = prepare(measured_data(job, job.run.build(), tokenizer, cache), tokenizer, job.run.data.split_seed, cache)
    rows = Rows(data.folder, "held_out")
    return ChosenRows(rows, np.arange(len(rows)), f"the held-out rows of {recipe}")


def rows_of_source(source: str, models: Sequence[str], most_rows: int, cache: Path = Path(CACHE), seed: int = 0) -> ChosenRows:
    """At most `most_rows` rows of a data source, chosen by `seed`, as the tokenizer of the first model makes them."""
    room = min([MOST_TOKENS, *(positions_of(model) or MOST_TOKENS for model in models)])
    config = DataConfig(train=source, held_out_rows=1, max_length_tokens=room)
    data = prepare(config, tokenizer_of(models[0]), seed, cache)
    rows = Rows(data.folder, "train")  # all but the single row that preparing sets aside
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:most_rows])
    return ChosenRows(rows, chosen, source)


def saved_student(model: str) -> str:
    """The student of a run when `model` is a run's folder, else `model` itself."""
    folder = Path(model).expanduser()
    if not (folder / RECIPE).is_file():
        return model
    if not (folder / "student").is_dir():
        do = f"Finish the run, or export a checkpoint: distill export {model}"
        raise Refusal(f"model {model!r}", "a run without an exported student", "a finished run, or a saved model", do)
    return str(folder / "student")
