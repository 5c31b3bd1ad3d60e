"""`distill evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table

from cluster.config import VerifierEndpoint
from jobs.run import cluster_file
from orchestrator.compare import Measuring, ModelScores, evaluate_models
from orchestrator.comparison_rows import ChosenRows, rows_of_recipe, rows_of_source, saved_student
from orchestrator.display import console
from orchestrator.errors import Refusal
from orchestrator.explain import refusal
from orchestrator.written import Writing, WrittenScores, evaluate_written

Line = tuple[str, list[float | None], str]
"""A measure's name, its value for each model, and how a value is printed."""
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Generate:
    """What a person says of answers that the models shall write; None where nothing."""

    wanted: bool = False
    """Write, also where nobody judges."""
    verifier: str | None = None
    pattern: str | None = None
    function: str | None = None
    samples: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None

    def writing(self) -> Writing | None:
        """How models write; None when they do not. `Refusal` for settings of something that was not asked for."""
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if name not in {"wanted", "verifier"}}
        stray = next((name for name, value in given.items() if value is not None), None)
        if not self.wanted and self.verifier is None:
            if stray is None:
                return None
            raise Refusal(stray, "neither --generate nor --verifier", "one of them", "Add --verifier numeric, say, or leave it out.")
        samples = self.samples or 1
        return Writing(
            judge=self._judge(),
            samples=samples,
            temperature=(0.0 if samples == 1 else 1.0) if self.temperature is None else self.temperature,
            max_new_tokens=self.max_new_tokens or MAX_NEW_TOKENS,
            seed=self.seed or 0,
        )

    def _judge(self) -> VerifierEndpoint | None:
        content: dict[str, Any] = {"kind": self.verifier, "pattern": self.pattern, "function": self.function}
        content = {"engine": "verifier"} | {name: value for name, value in content.items() if value is not None}
        if len(content) == 1:
            return None
        try:
            return VerifierEndpoint.model_validate(content)
        except ValidationError as error:
            raise refusal(error, VerifierEndpoint, content, "--verifier") from error


def show_evaluation(
    models: Sequence[str],
    teacher: str | None,
    data: str | None,
    recipe: Path | None,
    overrides: Sequence[str],
    rows: int = 256,
    generate: Generate | None = None,
) -> None:
    """Measures models on the same rows and prints them beside each other; with `generate`, what they write after the rows' prompts
    too."""
    writing = (generate or Generate()).writing()
    names = [saved_student(model) for model in models]
    chosen = _rows(names, data, recipe, overrides, rows)
    measuring = Measuring()
    # first, because it refuses whatever the other does
    written = [] if writing is None else evaluate_written(names, teacher, chosen.rows, chosen.indices, writing, measuring)
    scores = evaluate_models(names, teacher, chosen.rows, chosen.indices, measuring)
    lines = _lines(scores, measuring.top_k) + ([] if writing is None else _written_lines(written, writing.samples))
    out = console()
    out.print(f"{len(chosen.indices):,} rows, {scores[0].tokens:,} predicted tokens of {chosen.what}")
    out.print(_table([s.model for s in scores], teacher is not None, lines))
    out.print("Cross-entropy and KL in nats per token; exact over the whole vocabulary that all models share.", style="dim")
    for note in _notes(written):
        out.print(note, style="dim")


def _rows(names: Sequence[str], data: str | None, recipe: Path | None, overrides: Sequence[str], rows: int) -> ChosenRows:
    if (data is None) == (recipe is None):
        got = "neither --data nor --recipe" if data is None else "--data and --recipe"
        raise Refusal("rows to evaluate on", got, "one of them", "Add --recipe RECIPE for its held-out rows, or --data SOURCE.")
    if recipe is not None:
        return rows_of_recipe(recipe, overrides, cluster_file(None))
    if overrides:
        raise Refusal("--set", f"{overrides[0]!r} without a recipe", "a recipe to override", "Use --recipe, or leave --set out.")
    assert data is not None
    return rows_of_source(data, names, rows)


def _lines(scores: Sequence[ModelScores], top_k: int) -> list[Line]:
    return [
        ("parameters", [s.parameters for s in scores], "{:,}"),
        ("cross-entropy, nats/token", [s.cross_entropy for s in scores], "{:.4f}"),
        ("perplexity", [s.perplexity for s in scores], "{:,.2f}"),
        ("KL(teacher ‖ model), nats/token", [s.forward_kl for s in scores], "{:.4f}"),
        ("KL(model ‖ teacher), nats/token", [s.reverse_kl for s in scores], "{:.4f}"),
        ("same first choice as the teacher", [s.top1_agreement for s in scores], "{:.1%}"),
        ("shared first five choices", [s.top5_agreement for s in scores], "{:.1%}"),
        (f"mass on the teacher's first {top_k}", [s.topk_mass for s in scores], "{:.1%}"),
        ("speed, tokens/s", [s.tokens_per_second for s in scores], "{:,.0f}"),
    ]


def _written_lines(scores: Sequence[WrittenScores], samples: int) -> list[Line]:
    passed: list[Line] = [(f"right at least once in {samples}", [s.pass_at_k for s in scores], "{:.1%}")]
    return [
        ("right answers", [s.accuracy for s in scores], "{:.1%}"),
        ("  standard error", [s.accuracy_error for s in scores], "{:.1%}"),
        *(passed if samples > 1 else []),
        ("mean length of an answer, tokens", [s.tokens for s in scores], "{:,.1f}"),
        ("finished answers", [s.finished for s in scores], "{:.1%}"),
        ("own text: KL(teacher ‖ model)", [s.own_forward_kl for s in scores], "{:.4f}"),
        ("own text: KL(model ‖ teacher)", [s.own_reverse_kl for s in scores], "{:.4f}"),
        ("own text: same first choice", [s.own_agreement for s in scores], "{:.1%}"),
    ]


def _notes(scores: Sequence[WrittenScores]) -> list[str]:
    """What the figures leave out."""
    found = [f"Answers of {s.model}: to {s.prompts:,} prompts, {s.texts:,} texts." for s in scores[:1]]
    found += ["Own text is drawn at temperature 1."] if any(s.own_tokens for s in scores) else []
    for s in scores:
        counts = ((s.left_out, "prompts that leave no room"), (s.unjudgeable, "texts whose row has no answer"))
        said = [f"{count:,} {what}" for count, what in (*counts, (s.failed, "texts whose verifier gave way")) if count]
        found += [f"Left out for {s.model}: {', '.join(said)}."] if said else []
    return found


def _table(models: Sequence[str], compared: bool, lines: Sequence[Line]) -> Table:
    """One column per model and one line per measure, so that long names and many measures both fit."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for number, model in enumerate(models):
        is_teacher = compared and number == len(models) - 1
        table.add_column(f"{model} (teacher)" if is_teacher else model, justify="right", overflow="fold")
    for name, values, pattern in lines:
        if any(value is not None for value in values):
            table.add_row(name, *("–" if value is None else pattern.format(value) for value in values))
    return table
