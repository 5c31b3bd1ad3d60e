"""Two specialists and one student: how near routing, mixture and product of both come to a specialist's own student on its domain.

The teachers are trained once; everything is in one process, one Ray and one machine. What is finished stays in the scratch folder
(`--folder`) and is not done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jobs import specialists as task
from orchestrator import run as runs
from orchestrator.compare import evaluate_models
from orchestrator.comparison_rows import rows_of_recipe
from orchestrator.display import Display
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine
from tests.benchmarks.verifiable_task import spread

NAME = "specialists"
CODE, ARITHMETIC = task.DOMAINS
EVERYBODY = f"strategy.teachers=[{CODE}, {ARITHMETIC}]"
SMOKE = ["train.steps=2", "train.warmup_steps=0", "train.batch_rows=4", "data.held_out_rows=8", "data.max_rows=64"]
STEPS = 200
"""Of a student; one that reads a single domain has half of them, so that it reads as much of it as the others do."""


def length(steps: int) -> list[str]:
    """Overrides for so many steps, of which a tenth warms up."""
    return [f"train.steps={steps}", f"train.warmup_steps={steps // 10}"]


def one_teacher(name: str) -> str:
    """The strategy in which one specialist teaches every row, with the weights of the others."""
    return f"strategy={{type: multi-teacher, teachers: [{name}], take: {{type: topk, top_k: 64}}}}"


METHODS: dict[str, tuple[str, list[str]]] = {
    "routed": (task.BOTH, []),
    "mixture": (task.BOTH, [EVERYBODY]),
    "product": (task.BOTH, [EVERYBODY, "strategy.combine=product"]),
    "best by confidence": (task.BOTH, [EVERYBODY, "strategy.gate={by: confidence, best: true}"]),
    "code teacher only": (task.BOTH, [one_teacher(CODE)]),
    "arithmetic teacher only": (task.BOTH, [one_teacher(ARITHMETIC)]),
    "code alone": (CODE, [one_teacher(CODE), *length(STEPS // 2)]),
    "arithmetic alone": (ARITHMETIC, [one_teacher(ARITHMETIC), *length(STEPS // 2)]),
    "no teacher": (task.BOTH, ["strategy=cross-entropy"]),
}
"""What a student reads, and overrides of the recipe."""


def measure(settings: Settings) -> Figure:
    """The table of all methods and seeds; the figure is the smaller of both domains' closed share of the gap."""
    os.environ.pop("RAY_ADDRESS", None)
    folder, display, small = settings.folder / "specialists", Display(), SMOKE if settings.smoke else []
    task.prepare(folder)
    teachers = {name: task.train_teacher(folder, name, display, small) for name in task.DOMAINS}
    found: dict[str, list[dict[str, float]]] = {f"{n} teacher itself": [measured(folder, n, 0, path)] for n, path in teachers.items()}
    for seed in settings.seeds:
        for method in settings.methods or METHODS:
            found.setdefault(method, []).append(run(folder, method, seed, display, small))
        print(f"\nAfter seed {seed}:\n\n{table(found)}\n", flush=True)
    closed = {name: closed_share(found, name) for name in task.DOMAINS} if not settings.methods else {}
    return Figure(
        name=NAME,
        value=min(closed.values(), default=float("nan")),
        unit="share of nats per token",
        against="gap in held-out cross-entropy between a student of the other domain's specialist and one of its own specialist alone",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "seeds": list(settings.seeds), "closed": closed, "runs": found},
    )


def run(folder: Path, method: str, seed: int, display: Display, small: Sequence[str]) -> dict[str, float]:
    """One student's measures; the run is made unless they are there."""
    domain, more = METHODS[method]
    if (kept := _kept(folder, method, seed)) is not None:
        return kept
    extra = ["evaluate.every_steps=null", f"seed={seed}", *small]
    given = [*task.overrides(folder, domain), *length(STEPS), *more, *extra]
    made = runs.distill(task.RECIPE, given, task.cluster(folder), display=display)
    return measured(folder, method, seed, Path(made.student))


def measured(folder: Path, name: str, seed: int, student: Path) -> dict[str, float]:
    """Cross-entropy of a saved model on the held-out rows of each domain, in nats per token; kept, and read again where it is."""
    if (kept := _kept(folder, name, seed)) is not None:
        return kept
    found = {}
    for domain in task.DOMAINS:
        more = [*task.overrides(folder, domain), "strategy=cross-entropy", "endpoints={}"]
        rows = rows_of_recipe(task.RECIPE, more, task.cluster(folder))
        (score,) = evaluate_models([str(student)], None, rows.rows, rows.indices)
        found[domain] = score.cross_entropy
    file = _file(folder, name, seed)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def closed_share(found: Mapping[str, Sequence[Mapping[str, float]]], domain: str) -> float:
    """Of the gap on a domain, by means over seeds: how far the routed student is from one that only the other specialist taught."""
    other = next(name for name in task.DOMAINS if name != domain)

    def mean(method: str) -> float:
        return float(np.mean([of_seed[domain] for of_seed in found[method]]))

    far, near = mean(f"{other} teacher only"), mean(f"{domain} alone")
    return (far - mean("routed")) / (far - near)


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: a line for each method, mean and standard deviation over seeds."""
    lines = [["student of", *(f"cross-entropy, {name}" for name in task.DOMAINS)], ["---"] * (len(task.DOMAINS) + 1)]
    lines += [[method, *(spread([s[name] for s in of_seeds], "{:.3f}") for name in task.DOMAINS)] for method, of_seeds in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _file(folder: Path, name: str, seed: int) -> Path:
    return folder / "measured" / f"{name.replace(' ', '-')}-{seed}.json"


def _kept(folder: Path, name: str, seed: int) -> dict[str, float] | None:
    file = _file(folder, name, seed)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
