"""What a person sees while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from orchestrator.result import Row, RunResult

if TYPE_CHECKING:
    from orchestrator.board import Entry

LINE_SECONDS = 10.0
"""Without a terminal, how often a line of progress is printed."""


def console(stderr: bool = False) -> Console:
    """What this program prints on: as it is written, because paths, globs and messages of others hold brackets and colons that Rich
    would take for markup and emoji."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


class Display:
    """Speaks on standard error while a run goes on, and on standard output what it ended with."""

    def __init__(self, verbose: bool = False):
        self.verbose = verbose
        self._console = console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._plan_steps = 0
        self._fates: Sequence[str] = ()
        self._last_line = 0.0
        self._losses = ""

    def say(self, text: str) -> None:
        """One line of words."""
        self._console.print(text, soft_wrap=True)

    def plan(self, text: RenderableType) -> None:
        """The checked plan."""
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def training(self, steps: int, fates: Sequence[str] = ()) -> Iterator[None]:
        """Around the training of one plan: a live bar on a terminal, a line now and then elsewhere. `fates` are the metrics that tell
        why a step had nothing to teach."""
        self._plan_steps, self._fates = steps, fates
        if not self._console.is_terminal:
            self.say("Starting Ray, teachers and workers ...")
            yield
            return
        with self._progress_bar() as self._bar:
            self._task = self._bar.add_task("starting", total=steps, numbers="", start=False)
            yield
        self._bar = None

    @contextmanager
    def asking(self, teacher: str, parts: int, done: int, noun: str) -> Iterator[Callable[[int], None]]:
        """Around the filling of a store with `noun`; what it yields is told the tokens of every part that is kept."""
        self.say(f"Asking {teacher!r} for {parts - done} of {parts} parts of its {noun} ...")
        began, tokens, kept = time.monotonic(), 0, done

        def tell(more: int) -> None:
            nonlocal tokens, kept
            tokens, kept = tokens + more, kept + 1
            speed = tokens / max(1e-9, time.monotonic() - began)
            if bar is not None:
                bar.update(task, completed=kept, numbers=f"{tokens:,} tokens, {speed:,.0f} tokens/s")
            elif time.monotonic() - self._last_line > LINE_SECONDS or kept == parts:
                self._last_line = time.monotonic()
                self.say(f"part {kept}/{parts}  {tokens:,} tokens  {speed:,.0f} tokens/s")

        if not self._console.is_terminal:
            bar, task = None, TaskID(0)
            yield tell
            return
        with self._progress_bar() as bar:
            task = bar.add_task(noun, total=parts, completed=done, numbers="")
            yield tell

    def _progress_bar(self) -> Progress:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self._console, transient=False)

    def progress(self, entries: Iterable[Entry]) -> None:
        """Shows what the journal brought."""
        for entry in entries:
            if entry.kind == "attempt" and entry.attempt > 1:
                self.say(f"Attempt {entry.attempt} goes on after step {entry.step}.")
            elif entry.kind == "note":
                self.alarm(entry.values["text"])
            elif entry.kind == "eval":
                self.say(f"Held-out at step {entry.step}: {_evaluation(entry)}")
            elif entry.kind == "step":
                self._step(entry)

    def _step(self, entry: Entry) -> None:
        numbers = step_words(entry.values, self._fates)
        if self._bar is not None:
            if not self._bar.tasks[self._task].started:
                self._bar.start_task(self._task)
            self._bar.update(self._task, completed=entry.step, numbers=numbers, description="training")
        elif time.monotonic() - self._last_line > LINE_SECONDS or entry.step == self._plan_steps:
            self._last_line = time.monotonic()
            self.say(f"step {entry.step}/{self._plan_steps}  {numbers}")

    def alarm(self, text: str) -> None:
        """What an alarm says as it rises or clears."""
        self._console.print(text, style="bold yellow", soft_wrap=True)

    def stopping(self) -> None:
        self.say("Stopping after the next step with a checkpoint. Ctrl-C again stops at once.")

    def result(self, result: RunResult) -> None:
        """The comparison and where everything is, on standard output."""
        out = console()
        if result.comparison:
            out.print(comparison_table(result.comparison))
        out.print(f"\nStudent  {result.student}", soft_wrap=True)
        out.print(f"Run      {result.folder}", soft_wrap=True)
        out.print(f"MLflow   {result.page}", soft_wrap=True)
        out.print(f"Curves   {result.curves}", soft_wrap=True)
        far = f"distill export {result.folder} --to {result.name}"
        near = f"distill evaluate {result.student} --recipe {result.folder}/recipe.yaml"
        out.print(f"Next     {far if '://' in result.folder else near}", soft_wrap=True)


def step_words(values: Mapping[str, float], fates: Sequence[str]) -> str:
    """What a step taught and how fast; of one for which nothing counted, which of the `fates` its rows had."""
    if values.get("micro_batches") == 0:
        met = [f"{name} {values[name]:g}" for name in fates if values.get(name, 0.0) and values[name].is_integer()]
        return f"nothing to learn ({', '.join(met) or 'no token has a weight'})"
    terms = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
    return f"loss {values['loss']:.3f} ({terms}) {values['tokens_per_second']:,.0f} tokens/s"


def comparison_table(rows: Iterable[Row]) -> Table:
    """Held-out numbers side by side."""
    table = Table(title="Held-out rows (nats per token)", title_justify="left")
    table.add_column("model", no_wrap=True)
    for name in ("cross-\nentropy", "KL to\nteacher", "top-1\nagree", "para-\nmeters", "\nseconds", "tokens\nper s"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        table.add_row(
            r.who,
            _number(r.cross_entropy, ".3f"),
            _number(r.forward_kl, ".3f"),
            _number(r.top1_agreement, ".1%"),
            _number(r.parameters, ",.0f"),
            f"{r.seconds:,.1f}",
            f"{r.tokens_per_second:,.0f}",
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _evaluation(entry: Entry) -> str:
    wanted = ("cross_entropy", "forward_kl", "top1_agreement", "accuracy")
    found = {name: entry.values.get(f"eval/{name}") for name in wanted}
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items() if value is not None)
