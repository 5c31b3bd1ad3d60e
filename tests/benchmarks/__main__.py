"""`python -m tests.benchmarks [NAME]`: lists the benchmarks, or runs one."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Measure, Settings


def main(
    name: Annotated[str | None, typer.Argument(help="One of the list; without it, the list.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes: shows that the benchmark works, measures nothing.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each side runs, in turns.")] = 2,
    data: Annotated[Path | None, typer.Option(help="Rows for a benchmark on real data, such as GSM8K's train.jsonl.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Scratch folder to keep. [default: a temporary one]", show_default=False)] = None,
    alternatives: Annotated[bool, typer.Option(help="Also measure settings that no shipped recipe has.")] = False,
    methods: Annotated[str, typer.Option(help="Of a benchmark that compares methods: some of them, as in gkd,opd.")] = "",
    seeds: Annotated[str, typer.Option(help="Of a benchmark that trains to the end.")] = "0,1,2",
) -> None:
    """Side-by-side measurements. The last line printed is the figure as JSON."""
    if name is None:
        print(listing())
        return
    if name not in BENCHMARKS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(BENCHMARKS)}")
    measure: Measure = import_module(BENCHMARKS[name].home).measure
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        scratch = (folder or Path(temporary)).absolute()
        scratch.mkdir(parents=True, exist_ok=True)
        chosen = tuple(name for name in methods.split(",") if name), tuple(int(seed) for seed in seeds.split(","))
        figure = measure(Settings(scratch, smoke, 1 if smoke else rounds, data, alternatives, *chosen))
    print(figure.line())


def listing() -> str:
    """Name, one line and target of every benchmark."""
    return "\n".join(f"{name}\n    {entry.line}\n    target: {entry.target}" for name, entry in BENCHMARKS.items())


if __name__ == "__main__":
    typer.run(main)
