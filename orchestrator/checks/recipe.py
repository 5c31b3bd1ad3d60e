"""Checks of the recipe alone: numbers that must fit each other, names, addresses."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from urllib.parse import urlsplit

from orchestrator.config import Job, LayoutConfig, RunConfig, TrainConfig
from orchestrator.errors import Refusal
from orchestrator.explain import nearest
from orchestrator.layouts import layout_facts, layouts_with
from orchestrator.order import Order
from orchestrator.tracking_uri import without_password

NAME = re.compile(r"[A-Za-z0-9][\w.+=-]{0,199}", re.ASCII)
RESERVED = ("data", "mlartifacts")
"""Folders beside the runs in their storage."""
STORES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "databricks-uc")
"""Schemes of tracking addresses that MLflow itself knows; its file store refuses to work."""


def check_recipe(job: Job) -> list[str]:
    """Everything that needs neither files nor machine."""
    run = job.run
    check_name(run.name)
    _check_tracking(job.cluster.tracking_uri)
    _check_length(run.train)
    _check_batch(run.train)
    _check_layout(run.train)
    _check_student(run)
    return _about_endpoints(job) + _about_periods(run) + _about_dtype(run)


def check_name(name: str | None) -> None:
    """A run's name is a folder's name, beside others that are taken."""
    if name is None:
        return
    if not NAME.fullmatch(name):
        do = "Storage is where runs lie: set storage in ray_config.yaml for another folder." if "/" in name else "Rename it."
        raise Refusal("name", repr(name), "letters, digits and . _ - + = only, starting with a letter or digit", do)
    if name in RESERVED:
        raise Refusal("name", repr(name), "a name that the storage folder does not use itself", "Choose another.")


def _check_tracking(uri: str) -> None:
    scheme = urlsplit(uri).scheme.partition("+")[0]
    where, known = "mlflow.tracking_uri", (*STORES, *(point.name for point in entry_points(group="mlflow.tracking_store")))
    sample = "sqlite:///runs/mlflow.db or http://host:5000"
    if scheme in ("", "file"):
        raise Refusal(where, f"{uri!r}, a folder", sample, "MLflow 3 no longer keeps runs in plain folders; use a database or a server.")
    if scheme not in known and uri not in known:
        do = f"{nearest(scheme, known)}Correct the address, or install the MLflow plug-in that serves it."
        raise Refusal(where, f"the scheme {scheme!r}", f"one of {', '.join(STORES)}", do)
    if uri in known:
        return
    rest = uri.partition("://")[2]
    needs_slash = uri.startswith("sqlite") and not rest.startswith("/")
    if not rest.strip("/") or needs_slash or (scheme.startswith("http") and not urlsplit(uri).hostname):
        raise Refusal(where, repr(without_password(uri)), sample, "A sqlite path follows three slashes, a server's name two.")


def _check_length(train: TrainConfig) -> None:
    if (train.steps is None) == (train.epochs is None):
        got = "neither of steps and epochs" if train.steps is None else f"both steps={train.steps} and epochs={train.epochs}"
        raise Refusal("train", got, "exactly one of them", "Set train.steps or train.epochs, and the other to null.")
    if train.steps is not None:
        check_warmup(train, train.steps)


def check_warmup(train: TrainConfig, steps: int) -> None:
    """The learning rate comes down again before the run ends."""
    if train.warmup_steps >= steps:
        do = "Lower it, or train longer; the learning rate would never reach its peak and come down."
        raise Refusal("train.warmup_steps", str(train.warmup_steps), f"less than the {steps} steps of the run", do)


def _check_batch(train: TrainConfig) -> None:
    if train.batch_tokens is not None:
        return
    rows, workers = train.batch_rows, train.most_workers
    if rows < workers:
        do = "Raise train.batch_rows or lower train.workers; a worker without rows only waits."
        raise Refusal("train.batch_rows", f"{rows} rows for {workers} workers", f"at least {workers}", do)
    if rows % workers:
        low, high = rows // workers * workers, -(-rows // workers) * workers
        do = f"Set train.batch_rows={low} or {high}, so that workers get equal work."
        raise Refusal("train.batch_rows", f"{rows} rows for {workers} workers", f"a multiple of {workers}", do)


def _check_layout(train: TrainConfig) -> None:
    config, facts = train.layout, layout_facts(train.layout)
    if facts.one_worker and train.most_workers > 1:
        do = "Set train.workers=1, or train.layout=ddp for a copy on every worker."
        raise Refusal("train.layout", f"{config.type!r} with {train.most_workers} workers", "one worker", do)
    if not facts.elastic and train.fewest_workers < train.most_workers:
        do = "Set train.workers to a number, or train.layout=ddp or fsdp2."
        raise Refusal("train.workers", f"a changing number with the layout {config.type!r}", "a number", do)
    for name, field in LayoutConfig.model_fields.items():
        given = getattr(config, name)
        if name != "type" and name not in facts.settings and given != field.default:
            do = f"Leave it out, or set train.layout={' or '.join(layouts_with(name))}."
            raise Refusal(f"train.layout.{name}", repr(given), f"nothing: the layout {config.type!r} does not read it", do)
    if config.offload_optimizer and not config.zero_stage:
        do = "Set train.layout.zero_stage=1 or more, or leave the optimizer on the device."
        raise Refusal("train.layout", "offload_optimizer with zero_stage 0", "a stage that shards the optimizer", do)


def _check_student(run: RunConfig) -> None:
    if run.student.dtype == "float16":
        do = "Keep student.dtype=float32 and set train.precision=bfloat16 for speed."
        raise Refusal("student.dtype", "'float16'", "float32, because float16 weights overflow without loss scaling", do)


def check_attention(where: str, attention: str, gpus: float, half: bool, half_by: str) -> None:
    """Flash attention needs a GPU, its package and half precision; everything else runs anywhere."""
    if not attention.startswith("flash"):
        return
    do = f"Set {where}=sdpa, or give what it needs."
    if not gpus:
        raise Refusal(where, f"{attention!r} in a process without a GPU", "a GPU", do)
    if find_spec("flash_attn") is None:
        raise Refusal(where, f"{attention!r} without its package", "the package flash-attn, installed on every node", do)
    if not half:
        raise Refusal(where, f"{attention!r} in float32", f"half precision ({half_by})", do)


def _about_endpoints(job: Job) -> list[str]:
    both = sorted(set(job.run.endpoints) & set(job.cluster.endpoints))
    return [f"endpoint {n!r} is defined in ray_config.yaml and in the recipe; the recipe's fields win." for n in both]


def _about_periods(run: RunConfig) -> list[str]:
    """Periods that a run never reaches."""
    if run.train.steps is None:
        return []
    periods = {"evaluate.every_steps": run.evaluate.every_steps, "checkpoint.every_steps": run.checkpoint.every_steps}
    return [f"{k}={v} is longer than the run of {run.train.steps} steps." for k, v in periods.items() if v and v > run.train.steps]


def _about_dtype(run: RunConfig) -> list[str]:
    if run.student.dtype != "bfloat16":
        return []
    return ["student.dtype=bfloat16 rounds away small updates of the weights; float32 with train.precision=bfloat16 does not."]


def check_order(train: TrainConfig, order: Order, longest_tokens: int, mean_tokens: float) -> list[str]:
    """Steps and batches, once the rows are known."""
    check_warmup(train, order.steps)
    if train.batch_tokens is None:
        return []
    if train.batch_tokens < longest_tokens:
        do = f"Raise it to at least {longest_tokens}, or lower data.max_length_tokens."
        raise Refusal("train.batch_tokens", str(train.batch_tokens), f"room for the longest row of {longest_tokens} tokens", do)
    if train.batch_tokens < mean_tokens * train.most_workers:
        return [f"train.batch_tokens={train.batch_tokens} is less than a row for each of {train.most_workers} workers; some will wait."]
    return []
