"""The driver's record of a run: each step and each evaluation once, in the lineage of the surviving weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.board import Entry
from orchestrator.journal import Journal, MetricRow
from orchestrator.logbook import Logbook

LOGGED = ("step", "eval")
COUNTED = ("tokens", "step_seconds")
SCORE_SECONDS = "score_seconds/"
"""Before a teacher."""


@dataclass(frozen=True)
class Totals:
    """What the steps of a run took: those of the lineage, whoever drove it."""

    tokens: float = 0.0
    """Trained on."""
    seconds: float = 0.0
    score_seconds: Mapping[str, float] = field(default_factory=dict)
    """That each teacher worked."""

    @classmethod
    def of(cls, folder: Path) -> Totals:
        """From the journal in a run's folder."""
        sums: Counter[str] = Counter()
        for row in Journal(folder).rows():
            sums.update({name: value for name, value in row.values.items() if name in COUNTED or name.startswith(SCORE_SECONDS)})
        tokens, seconds = (float(sums[name]) for name in COUNTED)
        return cls(tokens, seconds, {n.removeprefix(SCORE_SECONDS): s for n, s in sums.items() if n.startswith(SCORE_SECONDS)})

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Ledger:
    """Takes journal entries of any attempt, keeps those of the lineage, and hands them to the run's logbook."""

    step: int = 0
    """Newest optimizer step."""
    attempt: int = 0
    held: Mapping[str, float] = field(default_factory=dict)
    """Bytes that rank 0 holds, by kind."""
    _newest: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOGGED, 0))
    _unlogged: list[Entry] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Ledger:
        """A ledger that knows what the run's journal already holds, so that a resumed run writes nothing twice."""
        ledger = cls()
        for row in Journal(folder).rows():
            kind = "eval" if any(name.startswith("eval/") for name in row.values) else "step"
            ledger._newest[kind] = max(ledger._newest[kind], row.step)
        return ledger

    def take(self, entries: Iterable[Entry]) -> list[Entry]:
        """The entries not seen before; a new attempt takes back what came after its start."""
        fresh = [e for e in entries if self._is_fresh(e)]
        self._unlogged += [e for e in fresh if e.kind in (*LOGGED, "attempt", "note")]
        return fresh

    def _is_fresh(self, entry: Entry) -> bool:
        if entry.kind == "attempt":
            self.attempt, self.step = entry.attempt, entry.step
            self._newest = {kind: min(step, entry.step) for kind, step in self._newest.items()}
        elif entry.kind == "held":
            self.held = entry.values
        elif entry.kind not in self._newest:
            return True
        elif entry.step <= self._newest[entry.kind]:
            return False
        else:
            self._newest[entry.kind] = entry.step
            self.step = max(self.step, entry.step)
        return True

    def tell(self, book: Logbook) -> None:
        """Passes on what was taken since the last call."""
        for entry in self._unlogged:
            if entry.kind == "attempt":
                book.truncate(entry.step, entry.attempt)
            elif entry.kind == "note":
                book.log_tags({f"mishap.{round(entry.time * 1e6)}": entry.values["text"]})  # whoever drives, in their order
            else:
                book.log([MetricRow(entry.step, entry.attempt, entry.values, entry.time)])
        self._unlogged = []
