"""What a student descends from, in words for people: its start, its teachers, its data and its run."""

from __future__ import annotations

from cluster.config import EndpointConfig
from cluster.storage import Folder
from orchestrator.config import RunConfig
from orchestrator.errors import Refusal
from orchestrator.journal import RunRecord
from orchestrator.plan import Plan
from orchestrator.saved_models import fingerprint

LINEAGE = "lineage.json"
"""The lineage of a run, in its folder, for exports after it."""


def lineage_of(plan: Plan) -> dict[str, str | float]:
    """What a run's student descends from: run, student, teachers with fingerprints, data. In words, for people."""
    record = RunRecord.load(plan.local)
    data, teachers = plan.data, {**plan.frozen, **plan.endpoints}
    return {
        **lineage_of_recipe(plan.folder, plan.job.run),
        **{f"teacher {name!r}": _teacher(config, plan.fingerprints.get(name)) for name, config in teachers.items()},
        "data fingerprint": f"sha256:{data.fingerprint}",
        "train rows": data.train.rows,
        "train tokens": data.train.tokens,
        "held-out rows": data.held_out.rows,
        "steps of the run": plan.steps,
        **({"MLflow run": record.run_id} if record else {}),
    }


def lineage_of_recipe(home: Folder, run: RunConfig) -> dict[str, str | float]:
    """The part of the lineage that stands in the recipe, for a run that left no more."""
    student = run.student
    fresh = student.init == "random"
    known = None if fresh else fingerprint(student.model, student.revision)
    start = f"fresh weights of the configuration {student.model}" if fresh else f"{student.model} ({known})"
    start = f"cut out of {start}" if student.truncate else start
    teachers = {f"teacher {name!r}": _teacher(config, None) for name, config in run.endpoints.items()}
    return {
        "run": home.root.rstrip("/").rpartition("/")[2],
        "student": start,
        **teachers,
        "data": ", ".join(run.data.sources),
        "seed": run.seed,
    }


def _teacher(config: EndpointConfig, known: str | None) -> str:
    model, revision = getattr(config, "model", None), getattr(config, "revision", None)
    if model is None:
        return str(config.engine)
    try:
        return f"{model} ({known or fingerprint(model, revision)})"
    except Refusal:  # moved or deleted since, or served elsewhere
        return f"{model} (not reached when this was written)"
