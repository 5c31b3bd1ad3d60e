"""`python -m tests.mutation`: how many of some sampled faults the tests of `tests/strategies` notice, and which they do not."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.mutants import Mutant, sample
from tests.mutation.runs import ROOT, judge, reach

FOLDER, ALSO = "strategies/objectives", ("strategies/signals.py",)


def main(
    mutants: Annotated[int, typer.Option(min=1, help="How many to try.")] = 300,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    file: Annotated[list[str] | None, typer.Option(help="Files to mutate, from the root. [default: objectives and signals]")] = None,
) -> None:
    """Puts sampled faults into objectives and signals, one at a time, and runs the tests that reach them until one fails."""
    os.chdir(ROOT)
    torch.set_num_threads(1)
    paths = file or [*(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / FOLDER).glob("*.py"))), *ALSO]
    chosen, started = sample(ROOT, paths, mutants, seed), time.perf_counter()
    known = reach()
    print(
        f"{len(chosen)} mutants of {len(paths)} files; the tests that reach them were found in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    left: list[tuple[Mutant, str]] = []
    excused = 0
    for i, mutant in enumerate(chosen, 1):
        if _key(mutant) in EQUIVALENT:
            excused += 1
        elif (verdict := judge(mutant, known.of(mutant))) != "killed":
            left.append((mutant, verdict))
        if i % 25 == 0:
            print(f"{i} tried, {len(left)} not noticed, {time.perf_counter() - started:.0f} s", flush=True)
    for mutant, verdict in left:
        print(_shown(mutant, verdict))
    counted = len(chosen) - excused
    share = 1 - len(left) / max(1, counted)
    print(f"killed {counted - len(left)} of {counted} ({share:.1%}), {excused} equivalent left out, {time.perf_counter() - started:.0f} s")
    for key in _stale(paths):
        print(f"matches nothing any more: {key}", file=sys.stderr)


def _key(mutant: Mutant) -> tuple[str, str, str]:
    _, before, after = mutant.diff(_source(mutant.path))
    return mutant.path, before, after


def _shown(mutant: Mutant, verdict: str) -> str:
    number, before, after = mutant.diff(_source(mutant.path))
    return f"{mutant.path}:{number} in {mutant.scope or 'the module'}: {verdict}\n    - {before}\n    + {after}"


def _stale(paths: list[str]) -> list[tuple[str, str, str]]:
    return [k for k in EQUIVALENT if k[0] in paths and k[1] not in {line.strip() for line in _source(k[0]).splitlines()}]


def _source(path: str) -> str:
    return Path(ROOT, path).read_text(encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
