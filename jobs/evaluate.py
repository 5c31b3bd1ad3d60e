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
    table = Table("model", box=None, pad_edge=False)
    heads = ["parameters", "cross-entropy", "perplexity"]
    versus = ["KL(teacher‖model)", "KL(model‖teacher)", "same first", "same five", f"mass on teacher's {top_k}"]
    for head in [*heads, *(versus if compared else []), "tokens/s"]:
        table.add_column(head, justify="right")
    for number, score in enumerate(scores):
        cells = [f"{score.parameters:,}", f"{score.cross_entropy:.4f}", f"{score.perplexity:,.2f}"]
        shares = (score.top1_agreement, score.top5_agreement, score.topk_mass)
        if compared:
            cells += [_cell(kl, "{:.4f}") for kl in (score.forward_kl, score.reverse_kl)]
            cells += [_cell(share, "{:.1%}") for share in shares]
        is_teacher = compared and number == len(scores) - 1
        table.add_row(f"[bold]{score.model}[/]" + (" (teacher)" if is_teacher else ""), *cells, f"{score.tokens_per_second:,.0f}")
    return table


def _cell(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)
