"""A search's two sides, as Ray Tune asks them, without Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.journal import Journal, MetricRow
from orchestrator.search.book import Book
from orchestrator.search.court import Court
from orchestrator.search.judge import Judge
from orchestrator.search.proposals import Proposals
from orchestrator.search.settings import SearchConfig
from orchestrator.search.trial import OUTCOME, TIME, Spec

METRIC = "eval/cross_entropy"
RECIPE = {"student": "some/model", "strategy": "logits", "data": "rows.jsonl"}


@dataclass(eq=False)
class Asked:
    """A trial as Tune shows it."""

    config: dict[str, Any]
    trial_id: str
    error: BaseException | None = None
    status: str = "RUNNING"

    def get_pickled_error(self) -> BaseException | None:
        return self.error

    def get_error(self) -> BaseException | None:
        return self.error


@dataclass
class Session:
    """A court whose stops are only noted, and its two sides."""

    court: Court
    stopped: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, wants_control: bool = False, every_steps: int = 0, **settings: Any) -> Session:
        config = SearchConfig.model_validate({"space": {"train.lr": {"choice": [1, 2, 3, 4]}}, "sampler": "grid", **settings})
        spec = Spec("find", RECIPE, {"storage": str(folder / "runs")}, str(folder), config.objective, every_steps=every_steps)
        (folder / "runs" / "find").mkdir(parents=True, exist_ok=True)
        court = Court(config, spec, Book(folder / "runs" / "find"), lambda trial: None, wants_control, first_evaluation=2)
        session = cls(court)
        court.stop = lambda number, generation: session.stopped.append(number)  # type: ignore[method-assign]
        return session

    def sides(self) -> tuple[Proposals, Judge]:
        judge = Judge(self.court)
        return Proposals(self.court, judge.halving), judge

    def begin(self, proposals: Proposals, judge: Judge, name: str) -> Asked:
        proposal = proposals.suggest(name)
        assert isinstance(proposal, dict), proposal
        trial = Asked(proposal, name)
        judge.on_trial_add(None, trial)
        return trial

    def report(self, judge: Judge, trial: Asked, step: int, value: float, **more: Any) -> None:
        folder = self.court.folder(trial.config["number"])
        folder.mkdir(parents=True, exist_ok=True)
        Journal(folder).append([MetricRow(step, 1, {METRIC: value}, 0.0)])
        assert judge.on_trial_result(None, trial, {TIME: step, METRIC: value, "tokens": 10.0 * step, **more}) == "CONTINUE"

    def end(self, proposals: Proposals, judge: Judge, trial: Asked, step: int, value: float, outcome: str = "finished") -> None:
        self.report(judge, trial, step, value, **{OUTCOME: outcome})
        judge.on_trial_complete(None, trial, {TIME: step, METRIC: value})
        proposals.on_trial_complete(trial.trial_id)


def outcomes(court: Court) -> dict[int, str]:
    return {t.number: t.outcome for t in court.book.trials()}
