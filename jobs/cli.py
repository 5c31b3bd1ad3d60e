"""The `distill` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from jobs.cli_cluster import cluster_app, doctor, jobs_app, submit
from orchestrator.display import console
from orchestrator.errors import DistillError

app = typer.Typer(
    name="distill",
    help="Teach small language models from large ones: Ray Data streams, Ray Train trains, MLflow remembers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[Path, typer.Argument(help="A recipe, such as jobs/recipes/tiny_logits.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides: student=Qwen/Qwen3-0.6B train.lr=2e-5", show_default=False)]
Cluster = Annotated[Path | None, typer.Option(help="Where to run.", show_default="ray_config.yaml of this folder, if there is one")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show what Ray and its workers say.")]


@app.command(epilog="For example: distill plan jobs/recipes/tiny_logits.yaml train.steps=20")
def plan(recipe: Recipe, overrides: Overrides = None, cluster: Cluster = None) -> None:
    """Check a run and print what it would do, hold and write. Loads no model."""
    from jobs.run import show_plan

    show_plan(recipe, overrides or [], cluster)


@app.command(epilog="For example: distill run jobs/recipes/tiny_logits.yaml train.lr=1e-3")
def run(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; leave it out with --resume.")] = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
    resume: Annotated[str | None, typer.Option(help="Go on from the last checkpoint of this run folder, or of its URI.")] = None,
    verbose: Verbose = False,
) -> None:
    """Distil a student, from data to an exported model."""
    from jobs.run import resume_run, start_run

    if resume is not None:
        given = ([str(recipe)] if recipe else []) + (overrides or [])
        resume_run(resume, given, cluster, verbose)
    elif recipe is not None:
        start_run(recipe, overrides or [], cluster, verbose)
    else:
        raise typer.BadParameter("give a recipe, or --resume with a run folder")


@app.command(epilog="For example: distill search jobs/recipes/tiny_search.yaml --plan")
def search(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe with a `search:` block; leave it out with --resume.")] = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
    show_plan: Annotated[bool, typer.Option("--plan", help="Check it, and print what would be tried, shared and spent.")] = False,
    resume: Annotated[str | None, typer.Option(help="Go on with the search in this folder or URI; what has ended is not repeated.")] = None,
    verbose: Verbose = False,
) -> None:
    """Try other settings of a recipe, on one teacher's signals, and find the best."""
    from jobs.search import resume_search, show_search, start_search

    given = overrides or []
    if resume is not None:
        resume_search(resume, ([str(recipe)] if recipe else []) + given, cluster, verbose)
    elif recipe is None:
        raise typer.BadParameter("give a recipe, or --resume with a search's folder")
    elif show_plan:
        show_search(recipe, given, cluster)
    else:
        start_search(recipe, given, cluster, verbose)


@app.command(epilog="For example: distill generate jobs/recipes/tiny_logits.yaml")
def generate(recipe: Recipe, overrides: Overrides = None, cluster: Cluster = None, verbose: Verbose = False) -> None:
    """Ask a recipe's teachers once and keep what they say: later runs read it instead."""
    from jobs.generate import run_generate

    run_generate(recipe, overrides or [], cluster, verbose)


@app.command()
def stores(
    action: Annotated[Literal["list", "verify", "prune"], typer.Argument(help="What to do with them.")] = "list",
    names: Annotated[list[str] | None, typer.Argument(help="Folders of stores; all when left out (of prune: none).")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="With prune: remove those that were not finished.")] = False,
    cluster: Cluster = None,
) -> None:
    """List the signal stores, check every byte of them, or remove some."""
    from jobs.stores import show_stores

    show_stores(action, names or [], cluster, unfinished)


@app.command(epilog="For example: distill evaluate runs/NAME --recipe runs/NAME/recipe.yaml")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Saved models or adapters, folders of runs, or hub names.")],
    teacher: Annotated[str | None, typer.Option(help="Folder or hub name; adds exact KL and agreement.")] = None,
    data: Annotated[str | None, typer.Option(help="A data source; or give --recipe to use its held-out rows.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="With --data: rows to use, chosen by seed.")] = 256,
    recipe: Annotated[Path | None, typer.Option(help="Evaluate on the held-out rows of this recipe.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Dotted override of the recipe.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Let the models answer the rows' prompts, too.")] = False,
    verifier: Annotated[
        str | None, typer.Option(help="Judge their answers by the rows' own: math, exact, numeric, regex, callable or tests.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="Of `--verifier regex`: its first group is the answer.")] = None,
    function: Annotated[str | None, typer.Option(help="Of `--verifier callable`: package.module:function.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each prompt.", show_default="1")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 writes the likeliest token.", show_default="0; 1 with --samples")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default="256")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of their draws.", show_default="0")] = None,
) -> None:
    """Compare models on held-out rows: cross-entropy, both KLs to a teacher, agreement; with a verifier, how often they are right."""
    from jobs.evaluate import Generate, show_evaluation

    asked = Generate(generate, verifier, pattern, function, samples, temperature, max_new_tokens, seed)
    show_evaluation(models, teacher, data, recipe, overrides or [], rows, asked)


@app.command(epilog="For example: distill export runs/NAME --to my-student")
def export(
    run_folder: Annotated[str, typer.Argument(help="Folder of a run, or its address in remote storage.")],
    to: Annotated[Path | None, typer.Option(help="New folder for the model.", show_default="RUN_FOLDER/export")] = None,
    checkpoint: Annotated[str, typer.Option(help="`best`, `last`, or the name of a checkpoint in the run folder.")] = "best",
    adapter: Annotated[bool, typer.Option("--adapter", help="Keep a LoRA student as an adapter instead of merging it.")] = False,
    dtype: Annotated[
        Literal["trained", "float32", "bfloat16"], typer.Option(help="Of the written weights; `trained` keeps the student's.")
    ] = "trained",
    cluster: Cluster = None,
) -> None:
    """Write a checkpoint's student as a Hugging Face folder, and prove that it reloads."""
    from jobs.export import export_run

    export_run(run_folder, to, checkpoint, adapter, dtype, cluster)


@app.command()
def strategies(name: Annotated[str | None, typer.Argument(help="Show the settings of one.")] = None) -> None:
    """List what can be taught and how, with settings and defaults."""
    from jobs.strategies import show_strategies

    show_strategies(name)


@app.command(epilog="For example: distill settings train")
def settings(path: Annotated[str | None, typer.Argument(help="A section, such as data, train.layout or endpoints.vllm.")] = None) -> None:
    """Explain what a recipe may say, section by section, with defaults."""
    from jobs.settings import show_settings
    from jobs.strategies import show_strategies

    if path is not None and path.split(".")[0] == "strategy":
        show_strategies(path.partition(".")[2] or None)
    else:
        show_settings(path)


@app.command()
def objectives(name: Annotated[str | None, typer.Argument(help="Show the settings of one.")] = None) -> None:
    """List what a term of the strategy `terms` can compute, with settings and defaults."""
    from jobs.strategies import show_objectives

    show_objectives(name)


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where the models, data and runs go.")] = Path("runs/quickstart"),
    verbose: Verbose = False,
) -> None:
    """Train a small teacher on the standard library's sources and distil it, on a laptop in minutes."""
    from jobs.quickstart import run_quickstart

    run_quickstart(folder, verbose)


@app.command()
def task(
    name: Annotated[Literal["arithmetic", "specialists"], typer.Argument(help="Which one.")],
    folder: Annotated[Path | None, typer.Option(help="Where data, models and runs go.", show_default="runs/NAME")] = None,
    verbose: Verbose = False,
) -> None:
    """Make data, a tokenizer and teachers to try methods on: `arithmetic`, whose answers can be judged, or two `specialists`."""
    from jobs.specialists import run_specialists
    from jobs.task import run_task

    makers = {"arithmetic": run_task, "specialists": run_specialists}
    makers[name](folder or Path("runs") / name, verbose)


app.command(
    context_settings={"ignore_unknown_options": True}, epilog="For example: distill submit run jobs/recipes/tiny_logits.yaml --retries 2"
)(submit)
app.command()(doctor)
app.add_typer(jobs_app)
app.add_typer(cluster_app)


def main() -> None:
    """Entry point: turns what this package raises on purpose into words and an exit code."""
    try:
        app()
    except DistillError as error:
        console(stderr=True).print(Text.assemble((type(error).__name__, "bold red"), f": {error}"), soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
