"""What a search leaves behind, and what it has spent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.filling import Filled
from orchestrator.search.book import Trial
from orchestrator.search.settings import Objective

SPENT = "spent.json"


@dataclass(frozen=True)
class Spent:
    """What a search took besides its trials' own costs, over all its drivers."""

    teacher_tokens: int = 0
    """Tokens that were teachers' work in filling shared stores; 0 when the stores were there."""
    teacher_seconds: float = 0.0
    seconds: float = 0.0
    """From the first trial's start to the last one's end."""

    def plus(self, filled: Iterable[Filled], seconds: float = 0.0) -> Spent:
        given = list(filled)
        tokens, took = sum(f.tokens for f in given), sum(f.seconds for f in given)
        return Spent(self.teacher_tokens + tokens, self.teacher_seconds + took, self.seconds + seconds)

    def save(self, folder: Path) -> Spent:
        (folder / SPENT).write_text(json.dumps(asdict(self)), encoding="utf-8")
        return self

    @classmethod
    def load(cls, folder: Path) -> Spent:
        """Nothing when the search has just begun."""
        path = folder / SPENT
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()


@dataclass(frozen=True)
class SearchResult:
    """What a finished search leaves behind."""

    name: str
    folder: str
    objectives: tuple[Objective, ...]
    paths: tuple[str, ...]
    """What was searched."""
    trials: tuple[Trial, ...]
    """In order of number, the control first."""
    best: Trial
    """The finished trial that is best by the first objective."""
    front: tuple[Trial, ...]
    """Finished trials that none beats in every objective; of a single objective, those that are equally best."""
    best_recipe: str
    """The recipe of `best`, which `distill run` takes as it is."""
    report: str
    """HTML; its pictures lie beside it."""
    mlflow_run_id: str
    page: str
    spent: Spent
