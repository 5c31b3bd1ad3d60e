"""How hard rows are to a network: the mean of -log p of each row's loss tokens, from a signal store that is filled before training."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.config import EndpointConfig, StoreEndpoint
from cluster.endpoints import make_engine
from orchestrator.checks.networks import Cast
from orchestrator.config import Job
from orchestrator.data import PreparedData
from orchestrator.errors import Refusal
from orchestrator.explain import nearest
from orchestrator.rows import Rows
from orchestrator.stores import Sources, Wanted, cache_folder, check_whole, wanted_store
from strategies.core import ScoreRequest
from strategies.stages.rollout import BASE
from strategies.stages.score import Score

SIGNAL = "difficulty"
ROWS_AT_ONCE = 1024


def asked(job: Job) -> dict[str, EndpointConfig]:
    """The endpoint whose losses order rows, by name; nothing where none does. `Refusal` for one that is not there, or has no model."""
    curriculum = job.run.curriculum
    order = curriculum.order if curriculum and curriculum.control == "none" else None
    if order is None or order.endpoint is None:
        return {}
    name, where = order.endpoint, "curriculum.order"
    if name == BASE and name not in job.endpoints:
        got = "the loss of a student of fresh weights, which are saved nowhere"
        raise Refusal(where, got, "that of a saved model", "Set student.init=pretrained, or by=teacher-loss.")
    if name not in job.endpoints:
        do = f"{nearest(name, job.endpoints)}Add endpoints.{name}.model, or set curriculum.order.teacher."
        raise Refusal(where, f"the loss of the endpoint {name!r}, which nothing defines", "one that is there", do)
    if job.endpoints[name].saved_model is None:
        do = "Name an endpoint with a saved model, or put the numbers into a column (data.score)."
        raise Refusal(where, f"the loss of endpoints.{name} ({job.endpoints[name].engine!r})", "that of a saved model", do)
    return {name: job.endpoints[name]}


def with_losses(job: Job, people: Cast, data: PreparedData, found: Sources) -> Sources:
    """What a run reads, with the store of the losses that order its rows, which is filled before training whatever `signals.mode` says."""
    for name, config in asked(job).items():
        wanted = wanted_store(job, people, data, name, config, Score(SIGNAL, name, ScoreRequest("per-token")))
        check_whole(wanted)
        missing = () if wanted.state == "finished" else (wanted,)
        return replace(found, read=(*found.read, wanted), captures=(*found.captures, *missing), losses=wanted)
    return found


def losses_name(wanted: Wanted | None) -> str:
    """Of the file of a store's row losses, beside the rows to train on; nothing without one."""
    return f"loss-{wanted.spec.key.digest}" if wanted else ""


def write_losses(job: Job, wanted: Wanted, folder: str) -> None:
    """Writes the losses `(R,)` float32 of the rows to train on beside them, unless they are there, once their store is whole."""
    path = Path(folder) / "train" / f"{losses_name(wanted)}.npy"
    if path.exists():
        return
    engine = make_engine(StoreEndpoint(engine="store", folders=(wanted.files.folder.root,), cache=str(cache_folder(job))))
    rows, found = Rows(folder, "train"), []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        columns = rows.read(np.arange(start, min(start + ROWS_AT_ONCE, len(rows))))
        known = engine.score(columns, wanted.stage.request)["logprob"].astype(np.float64)
        found.append(row_means(-known, columns["loss_mask"], columns["lengths"]))
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, np.concatenate(found).astype(np.float32))
    part.replace(path)


def row_means(values: NDArray[np.float64], loss_mask: NDArray[np.generic], lengths: NDArray[np.generic]) -> NDArray[np.float64]:
    """Mean of the values `(N,)` of each row's loss tokens, `(R,)`; every row has one."""
    row = np.repeat(np.arange(len(lengths)), lengths.astype(np.int64))[loss_mask.astype(bool)]
    sums = np.bincount(row, weights=values, minlength=len(lengths))
    return np.asarray(sums / np.bincount(row, minlength=len(lengths)))
