"""The driver's record of a run: each step and each evaluation once, in the lineage of the surviving weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from orchestrator.board import Entry
from orchestrator.track import MetricRow

JOURNAL = "metrics.jsonl"


class Ledger:
    """Takes journal entries of any attempt and keeps those of the lineage."""

    def __init__(self, folder: Path):
        self.step = 0
        """Newest optimizer step."""
        self.attempt = 0
        self.held: dict[str, float] = {}
        """Bytes that rank 0 holds, by kind."""
        self._newest = {"step": 0, "eval": 0}
        self._unlogged: list[MetricRow] = []
        self._tokens = 0.0
        self._seconds = 0.0
        self._scored = 0.0
        for line in _lines(folder / JOURNAL):
            kind = "eval" if any(k.startswith("eval/") for k in line["values"]) else "step"
            self._newest[kind] = max(self._newest[kind], line["step"])

    def take(self, entries: Iterable[Entry]) -> list[Entry]:
        """The entries not seen before; a new attempt takes back what came after its start."""
        fresh = []
        for entry in entries:
            if entry.kind == "attempt":
                self.attempt = entry.attempt
                self._newest = {kind: min(step, entry.step) for kind, step in self._newest.items()}
            elif entry.kind == "held":
                self.held = dict(entry.values)
            elif entry.step <= self._newest[entry.kind]:
                continue
            else:
                self._note(entry)
            fresh.append(entry)
        return fresh

    def _note(self, entry: Entry) -> None:
        self._newest[entry.kind] = entry.step
        self.step = max(self.step, entry.step)
        self._unlogged.append(MetricRow(entry.step, entry.attempt, entry.values, entry.time))
        if entry.kind == "step":
            self._tokens += entry.values["tokens"]
            self._seconds += entry.values["step_seconds"]

    def unlogged(self) -> list[MetricRow]:
        """Rows taken since the last call."""
        rows, self._unlogged = self._unlogged, []
        return rows

    def totals(self) -> dict[str, float]:
        """Trained tokens, seconds in steps, and their ratio, of this driver's share of the run."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return {"tokens": self._tokens, "training_seconds": self._seconds, "tokens_per_second": rate}


def _lines(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
