"""The driver's watch over a run: its alarms as they rise and clear, in the lineage of the surviving weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.alarms import Alarms, Finding
from orchestrator.board import Entry
from orchestrator.history import History
from orchestrator.journal import Journal, MetricRow
from orchestrator.ledger import LOGGED
from orchestrator.logbook import Logbook

PREFIX = "alarm/"
"""Of the metric that is 1 at the step at which an alarm rises, and 0 where it clears; of its tag it is `alarm.`."""


@dataclass(frozen=True)
class Change:
    """An alarm rises, or clears when `finding` is None."""

    name: str
    since: int
    """The step at which it rose, perhaps under an earlier driver."""
    at: Entry
    finding: Finding | None
    stops: bool

    def __str__(self) -> str:
        if self.finding is None:
            return f"Alarm {self.name} of step {self.since} is over at step {self.at.step}."
        again = f"of step {self.since} still there at step {self.at.step}" if self.since < self.at.step else f"at step {self.since}"
        return f"Alarm {self.name} {again}: {self.finding}" + (" The run stops with a checkpoint." if self.stops else "")

    @property
    def row(self) -> MetricRow:
        """What the journal keeps of it."""
        return MetricRow(self.at.step, self.at.attempt, {PREFIX + self.name: float(self.finding is not None)}, self.at.time)

    @property
    def tag(self) -> dict[str, str]:
        return {f"alarm.{self.name}": str(self)}


@dataclass
class Watch:
    """Takes the journal's fresh entries in order. An alarm rises once; it clears when nothing was found for a window of steps."""

    alarms: Alarms
    history: History
    stopped: list[Change] = field(default_factory=list)
    """Alarms that rose and ask to stop the run."""
    _since: dict[str, int] = field(default_factory=dict)
    """Steps at which alarms rose that have not cleared."""
    _found: dict[str, int] = field(default_factory=dict)
    """Newest steps at which their reasons were found."""
    _said: set[str] = field(default_factory=set)
    """Alarms that this driver has told of."""
    _untold: list[Change] = field(default_factory=list)

    @classmethod
    def of(cls, alarms: Alarms, folder: Path) -> Watch:
        """A watch that knows what the run's journal already holds, so that a resumed run is judged by how it began."""
        watch = cls(alarms, alarms.history())
        for row in Journal(folder).rows():
            watch.history.add(row.step, row.values)
            for metric, value in row.values.items():
                if metric.startswith(PREFIX):
                    watch._remember(metric.removeprefix(PREFIX), row.step, value > 0)
        return watch

    def _remember(self, name: str, step: int, rose: bool) -> None:
        if rose:
            self._since.setdefault(name, step)
        else:
            self._since.pop(name, None)

    def take(self, entries: Iterable[Entry]) -> list[Change]:
        """What changes with the entries. A new attempt takes back what came after its start."""
        changes: list[Change] = []
        for entry in entries:
            if entry.kind == "attempt":
                changes = _until(entry.step, changes)
                self._forget_after(entry.step)
            elif entry.kind in LOGGED:
                self.history.add(entry.step, entry.values)
                changes += self._judge(entry)
        self.stopped += [change for change in changes if change.stops]
        self._untold += changes
        return changes

    def _forget_after(self, step: int) -> None:
        self.history.forget_after(step)
        self._untold = _until(step, self._untold)
        self._since = {name: since for name, since in self._since.items() if since <= step}
        self._found = {name: min(found, step) for name, found in self._found.items() if name in self._since}
        self._said &= set(self._since)

    def _judge(self, entry: Entry) -> list[Change]:
        changes = []
        for name, finding in self.alarms.judge(self.history).items():
            since = self._since.setdefault(name, entry.step)
            self._found[name] = entry.step
            if name not in self._said:
                self._said.add(name)
                changes.append(Change(name, since, entry, finding, self.alarms.stops(name)))
        for name, since in list(self._since.items()):
            if entry.step - self._found.setdefault(name, entry.step) >= self.alarms.window_steps:
                del self._since[name], self._found[name]
                self._said.discard(name)
                changes.append(Change(name, since, entry, None, False))
        return changes

    def tell(self, book: Logbook) -> None:
        """Passes on what changed since the last call, after the steps at which it did."""
        for change in self._untold:
            book.log([change.row])
            book.log_tags(change.tag)
        self._untold = []


def _until(step: int, changes: Iterable[Change]) -> list[Change]:
    return [change for change in changes if change.at.step <= step]


def stopping_words(watch: Watch, folder: str, checkpoint: str, step: int, steps: int) -> str:
    """What is said of a run that its alarms stopped after `step`: which, where its checkpoint is, and how to go on."""
    names = " and ".join(dict.fromkeys(change.name for change in watch.stopped))
    overrides = " ".join(dict.fromkeys(watch.alarms.unstopping(change.name) for change in watch.stopped))
    found = " ".join(str(change.finding) for change in watch.stopped)
    return (
        f"stopped by the alarm {names} after step {step} of {steps}: {found} Its checkpoint is {checkpoint}. "
        f"To go on all the same: distill run --resume {folder} {overrides}. To take the best student so far: distill export {folder}"
    )
