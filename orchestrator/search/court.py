"""What proposals and verdicts of a search rest on: its record, its budget, and a way to reach trials under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ray

from cluster.storage import Folder
from orchestrator.owner import small_files
from orchestrator.search.book import CONTROL, Book, Trial, curve, run_name
from orchestrator.search.settings import SearchConfig
from orchestrator.search.space import grid
from orchestrator.search.trial import Spec


@dataclass(eq=False)
class Court:
    """One search in its driver's process, where Tune's questions are answered."""

    config: SearchConfig
    spec: Spec
    book: Book
    tell: Callable[[Trial], None]
    """Hears of every trial that has moved."""
    wants_control: bool
    first_evaluation: int
    """Optimizer steps after which a trial is first measured."""
    began: float = 0.0
    interrupted: bool = False
    """A person asked to stop: nothing new begins, and what is under way may go on later."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Tune keeps a copy of all it is given, to go on from; a search goes on from its book, so that there is nothing to copy."""
        return (object, ())

    def __deepcopy__(self, memory: dict[int, object]) -> Court:
        return self

    def spent(self) -> str:
        """Which budget is used up, in words; nothing while none is."""
        tokens = sum(t.metrics.get("tokens", 0.0) for t in self.book.trials() if t.number != CONTROL)
        if self.config.tokens is not None and tokens >= self.config.tokens:
            return f"the search's {self.config.tokens:,} tokens are used up"
        seconds = time.monotonic() - self.began
        if self.config.seconds is not None and seconds >= self.config.seconds:
            return f"the search's {self.config.seconds:,g} seconds are over"
        return ""

    @property
    def to_propose(self) -> bool:
        """Whether trials are still to begin that have not been proposed."""
        return sum(t.number != CONTROL for t in self.book.trials()) < self._most and not self.spent()

    @cached_property
    def _most(self) -> int:
        """Trials that may begin: a grid may have fewer points."""
        own = len(grid(self.config.space, self.spec.content)) if self.config.sampler == "grid" else self.config.trials
        return min(own, self.config.trials)

    def run(self, number: int, generation: int | None = None) -> Folder:
        """The run folder of a trial, the one that counts unless another generation is asked for."""
        trial = self.book.get(number)
        return self.spec.folder(number, generation if generation is not None else trial.generation if trial else 0)

    def folder(self, number: int) -> Path:
        """Where the small files of the run that counts lie."""
        return small_files(self.run(number))

    def curve(self, number: int) -> dict[int, float]:
        """The first objective of a trial, by step."""
        return curve(self.folder(number), self.config.objective[0].metric)

    def stop(self, number: int, generation: int) -> None:
        """Tells a trial's run to write a checkpoint and end. One that has no board yet, or none any more, cannot hear it."""
        try:
            board = ray.get_actor(f"{run_name(self.spec.search, number, generation)}/board")
        except ValueError:
            return
        board.ask_to_stop.remote()

    def interrupt(self) -> None:
        """Nothing new begins, and every trial under way ends after a checkpoint."""
        self.interrupted = True
        for trial in self.book.trials():
            if trial.outcome == "running":
                self.stop(trial.number, trial.generation)
