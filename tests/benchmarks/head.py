"""Benchmarks of the output head alone: sides in processes of their own, in turns, and the figure of their ratios.

All sides of one case are given the same seeded hidden states, weights and teacher, and must come to the same loss and
gradients; a side that does not is an error, not a figure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isclose
from pathlib import Path
from typing import Any, Literal

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.product import ROOT, TAIL_LINES, environment

SAME = 1e-3
"""Relative difference up to which two sides computed the same loss and gradient norms."""
WORK = "tests.benchmarks.head_work"


@dataclass(frozen=True)
class HeadSpec:
    """One side of one case: forward and backward of an output head on `tokens` hidden states."""

    side: str
    """One of `head_work.SIDES`."""
    what: Literal["seconds", "bytes"]
    vocabulary: int = 131_072
    tokens: int = 2_048
    width: int = 1_024
    kept: int = 64
    """Teacher tokens of a top-k signal."""
    repeats: int = 3
    """Timed runs after one to warm up."""
    threads: int = len(os.sched_getaffinity(0))
    seed: int = 0

    @classmethod
    def load(cls, path: Path) -> HeadSpec:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Answer:
    """What one process found."""

    value: float
    """Median seconds of forward and backward; or peak bytes that they took besides one `(V, D)` weight gradient."""
    loss: float
    gradients: tuple[float, float]
    """Norms of the gradients of hidden states and weight."""
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """A side over the least of others, with the quantity that all of them compute."""

    quantity: str
    over: str
    under: Sequence[str]


What = Literal["seconds", "bytes"]


def large(what: What, smoke: bool) -> HeadSpec:
    """The case that targets are about, its side left open."""
    return HeadSpec("", what, vocabulary=640, tokens=48, width=16, kept=8, repeats=1) if smoke else HeadSpec("", what)


def small(what: What, smoke: bool) -> HeadSpec:
    """One micro-batch of the quickstart's student."""
    sizes = {"vocabulary": 4_096, "tokens": 2_032, "width": 88, "kept": 256}
    return large(what, smoke) if smoke else HeadSpec("", what, **sizes, repeats=40)


def answers(settings: Settings, case: HeadSpec, sides: Sequence[str]) -> dict[str, list[Answer]]:
    """Every side once a round, in turns."""
    found: dict[str, list[Answer]] = {}
    for _ in range(settings.rounds):
        for side in sides:
            answer = run_side(HeadSpec(**{**asdict(case), "side": side}), settings.folder)
            found.setdefault(side, []).append(answer)
            print(f"{side}: {answer.value:,.4g} {case.what}, load {os.getloadavg()[0]:.2f}", flush=True)
    return found


def run_side(spec: HeadSpec, folder: Path) -> Answer:
    """Runs one side as a process. `SystemExit` when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered = folder / "head-spec.json", folder / "head-answer.json"
    asked.write_text(json.dumps(asdict(spec)), encoding="utf-8")
    command = [sys.executable, "-m", WORK, str(asked), str(answered)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{spec.side} ended with {done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-TAIL_LINES:]))
    content = json.loads(answered.read_text(encoding="utf-8"))
    return Answer(**{**content, "gradients": tuple(content["gradients"])})


def figure(
    name: str, settings: Settings, case: HeadSpec, ratios: Sequence[Ratio], against: str, found: Mapping[str, list[Answer]]
) -> Figure:
    """The worst of `ratios` as value, and everything that was measured."""
    medians = {side: median(a.value for a in rounds) for side, rounds in found.items()}
    for ratio in ratios:
        for other in ratio.under:
            check_same(ratio, other, found[ratio.over][0], found[other][0])
    values = {r.quantity: medians[r.over] / min(medians[other] for other in r.under) for r in ratios}
    return Figure(
        name=name,
        value=max(values.values()),
        unit=f"{case.what} over {case.what}",
        against=against,
        target=BENCHMARKS[name].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "ratios": values,
            f"median_{case.what}": medians,
            "rounds": {side: [a.value for a in rounds] for side, rounds in found.items()},
            "detail": {side: rounds[-1].detail for side, rounds in found.items()},
            "case": {k: v for k, v in asdict(case).items() if k != "side"},
        },
    )


def check_same(ratio: Ratio, other: str, mine: Answer, theirs: Answer) -> None:
    """`SystemExit` when two sides did not compute the same quantity."""
    mine_all, theirs_all = (mine.loss, *mine.gradients), (theirs.loss, *theirs.gradients)
    if not all(isclose(a, b, rel_tol=SAME) for a, b in zip(mine_all, theirs_all, strict=True)):
        raise SystemExit(f"{ratio.quantity}: {ratio.over} found {mine_all}, {other} found {theirs_all}; expected the same")
