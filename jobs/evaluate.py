"""`distill evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.run import cluster_file
from orchestrator.compare import Measuring, ModelScores, evaluate_models
from orchestrator.comparison_rows import ChosenRows, rows_of_recipe, rows_of_source, saved_student
from orchestrator.errors import Refusal


def show_evaluation(
    models: Sequence[str], teacher: str | None, data: str | None, recipe: Path | None, overrides: Sequence[str], rows: int = 256
) -> None:
    """Measures models on the same rows and prints them beside each other."""
    names = [saved_student(model) for model in models]
    chosen = _rows(names, data, recipe, overrides, rows)
    measuring = Measuring()
    scores = evaluate_models(names, teacher, chosen.rows, chosen.indices, measuring)
    console = Console(highlight=False)
    console.print(f"{len(chosen.indices):,} rows, {scores[0].tokens:,} predicted tokens of {chosen.what}")
    console.print(_table(scores, teacher is not None, measuring.top_k))
    console.print("Cross-entropy and KL in nats per token; exact over the whole vocabulary that all models share.", style="dim")


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


def _table(scores: Sequence[ModelScores], compared: bool, top_k: int) -> Table:
    """One column per model and one line per measure, so that long names and many measures both fit."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for number, score in enumerate(scores):
        is_teacher = compared and number == len(scores) - 1
        table.add_column(f"{score.model} (teacher)" if is_teacher else score.model, justify="right", overflow="fold")
    lines: list[tuple[str, list[float | None], str]] = [
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
    for name, values, pattern in lines:
        if any(value is not None for value in values):
            table.add_row(name, *("–" if value is None else pattern.format(value) for value in values))
    return table
