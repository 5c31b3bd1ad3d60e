"""What a person sees while a run goes on."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console

from orchestrator.board import Entry
from orchestrator.plan import Plan


class Display:
    def __init__(self, verbose: bool = False):
        self.verbose = verbose
        self.console = Console(stderr=True)

    def plan(self, plan: Plan) -> None:
        self.console.print(f"{plan.name}: {plan.steps} steps")

    def progress(self, plan: Plan, entries: Iterable[Entry]) -> None:
        for e in entries:
            self.console.print(e.kind, e.step, {k: round(v, 4) for k, v in e.values.items()})

    def stopping(self) -> None:
        self.console.print("stopping after the next step; press Ctrl-C again to stop at once")

    def say(self, text: str) -> None:
        self.console.print(text)

    def result(self, result: object) -> None:
        self.console.print(result)
