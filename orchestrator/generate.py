"""`distill generate`: asks a recipe's teachers once and keeps what they say and write, without training anybody."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import Job, load_job, to_yaml
from orchestrator.display import Display
from orchestrator.errors import Interrupted, Refusal
from orchestrator.filling import Filled, fill
from orchestrator.plan import Plan, make_plan
from orchestrator.plan_text import plan_text
from orchestrator.result import RECIPE
from orchestrator.run import planned_with_ray, with_texts
from orchestrator.selection import Selected
from orchestrator.stores import Wanted
from orchestrator.track import MetricRow, Tracker, reconcile_all


@dataclass(frozen=True)
class Wrote:
    """One text store after the call."""

    teacher: str
    folder: str
    texts: int
    tokens: int
    """Of all its texts."""
    written_tokens: int
    """Those of this call; 0 when everything was there."""
    seconds: float
    cost: float
    """Of those tokens and their prompts, where the endpoint has a price."""


@dataclass(frozen=True)
class Kept:
    """One store after the call."""

    teacher: str
    folder: str
    rows: int
    loss_tokens: int
    scored_tokens: int
    """Tokens that the teacher read in this call; 0 when everything was there."""
    seconds: float
    cost: float
    """Of those tokens, where the endpoint has a price."""
    bytes_per_token: float
    """A loss token."""


@dataclass(frozen=True)
class Generated:
    """What a recipe's teachers have said and written."""

    signals: tuple[Kept, ...]
    texts: tuple[Wrote, ...]
    selected: Selected | None
    """The rows made of the texts."""


def generate(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    cluster: str | Path | Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> Generated:
    """Fills the text and signal stores of a recipe and returns what is kept; what was there is not asked again.

    Arguments as for `orchestrator.run.distill`. `Refusal` before anything is written, also for a recipe that asks no teacher.
    """
    source = Path(recipe) if isinstance(recipe, str) else recipe
    job = _for_stores(load_job(source, overrides, Path(cluster) if isinstance(cluster, str) else cluster))
    name = f"generate-{source.stem if isinstance(source, Path) else 'run'}"
    shown = display or Display()

    def planned(job: Job) -> Plan:
        return _checked(make_plan(job, name))

    plan, took = with_texts(planned_with_ray(job.cluster, lambda: planned(job), shown), planned, shown)
    shown.plan(plan_text(plan))
    tracker = _tracker(plan)
    try:
        texts = _wrote(plan, took, tracker)
        kept = [_keep(plan, wanted, tracker, number, shown) for number, wanted in enumerate(plan.sources.read, start=1)]
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED")
        raise
    tracker.finish("FINISHED")
    return Generated(tuple(kept), texts, plan.text.selected if plan.text else None)


def _for_stores(job: Job) -> Job:
    signals = job.run.signals.model_copy(update={"mode": "store"})
    return job.model_copy(update={"run": job.run.model_copy(update={"name": None, "signals": signals, "baseline": False})})


def _checked(plan: Plan) -> Plan:
    if not plan.sources.read and plan.text is None:
        do = "Name a strategy with a teacher, such as logits."
        raise Refusal(
            f"strategy.{plan.job.run.strategy.type}",
            "no question to a teacher",
            "stages that score rows, or text that a teacher writes",
            do,
        )
    return plan


def _tracker(plan: Plan) -> Tracker:
    reconcile_all(plan.local.parent)
    tracker = Tracker.start(
        uri=plan.job.cluster.tracking_uri,
        experiment=plan.job.cluster.mlflow.experiment,
        name=plan.name,
        folder=plan.local,
        params={**plan.job.run.model_dump(mode="json"), "fingerprint": plan.fingerprints},
        tags={**plan.job.run.tags, "kind": "generate"},
    )
    tracker.log_text(to_yaml(plan.job.run), RECIPE)
    return tracker


def _wrote(plan: Plan, took: Mapping[str, Filled], tracker: Tracker) -> tuple[Wrote, ...]:
    if plan.text is None:
        return ()
    found = []
    for wanted in plan.text.stores:
        root, parts = wanted.files.folder.root, wanted.files.parts
        now = took.get(root, Filled())
        texts = wanted.spec.rows * wanted.authored.write.sampling.samples
        found.append(Wrote(wanted.spec.name, root, texts, sum(p.loss_tokens for p in parts), now.tokens, now.seconds, now.cost))
    for name, content in plan.text.about().items():
        tracker.log_text(content, name)
    return tuple(found)


def _keep(plan: Plan, wanted: Wanted, tracker: Tracker, number: int, display: Display) -> Kept:
    captures = {c.files.folder: c for c in plan.captures()}
    job = captures.get(wanted.files.folder)
    filled = fill(job, display) if job else Filled()
    parts = wanted.files.parts
    kept = Kept(
        teacher=wanted.spec.name,
        folder=wanted.files.folder.root,
        rows=wanted.spec.rows,
        loss_tokens=sum(p.loss_tokens for p in parts),
        scored_tokens=filled.tokens,
        seconds=filled.seconds,
        cost=filled.cost,
        bytes_per_token=wanted.files.bytes_per_token,
    )
    numbers = {name: float(value) for name, value in vars(kept).items() if isinstance(value, int | float)}
    tracker.log([MetricRow(number, 1, {f"{name}/{kept.teacher}": value for name, value in numbers.items()}, time.time())])
    tracker.log_text(wanted.files.manifest_text, f"signals/{kept.teacher}-{wanted.spec.key.digest}.json")
    return kept
