"""Brings what a run's folder holds to MLflow. The only file that imports MLflow, and it does so late.

Speaks through `MlflowClient` with explicit ids, never through the process-wide active run. Every call goes on where the
last one stopped, and repeating one adds nothing: rows keep their own times, and what MLflow has is asked before anything
is sent again.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator import tracking_uri
from orchestrator.errors import Refusal, Unanswered
from orchestrator.journal import Cursor, Journal, Lines, MetricRow, RunRecord, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Run

T = TypeVar("T")

_BATCH_METRICS = 900  # MLflow takes 1000 entities at once, tags included
_BATCH_PARAMS = 100
_BATCH_TAGS = 100
_KEY_CHARACTERS, _PARAM_CHARACTERS, _TAG_CHARACTERS, _MODEL_PARAM_CHARACTERS = 250, 6000, 8000, 500
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # whoever delivers tries again by itself
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
OPENING = "distill.opening"
"""Tag by which a new run is found again whose making was asked for and not answered."""
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED")
"""What may be over in a while; the first is also a connection that was refused, and a status that MLflow has no name for."""

logger = logging.getLogger(__name__)


def connect(uri: str) -> MlflowClient:
    """A client that gives up quickly. Importing MLflow takes seconds, and a new sqlite file takes two more."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)  # it prints a stack trace for every locked database
    return MlflowClient(tracking_uri=uri)


def trouble() -> tuple[type[Exception], ...]:
    """What MLflow raises when it cannot be reached or will not do as asked (a proxy's page is a ValueError)."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, ValueError)


def is_passing(error: Exception) -> bool:
    """Whether the same question may be answered in a while: nobody was there, or the server was in trouble of its own."""
    from mlflow.exceptions import InvalidUrlException
    from sqlalchemy.exc import DBAPIError

    code = getattr(error, "error_code", None)
    if code is not None:
        return code in _PASSING and not isinstance(error, InvalidUrlException)
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):  # of a database in a folder that is none
        return False
    return isinstance(error, OSError | DBAPIError)


def is_final(error: Exception) -> bool:
    """Whether trying again is useless: the run was deleted, or MLflow calls the request wrong."""
    return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


def brief(error: Exception) -> str:
    """The first line of an error, short enough for a log line."""
    return tracking_uri.without_password((str(error).splitlines() or [type(error).__name__])[0])[:200]


def open_run(uri: str, experiment: str, name: str, tags: Mapping[str, str], run_id: str | None) -> tuple[MlflowClient, Run]:
    """A new run of `experiment`, or the old run `run_id` set to RUNNING; database and experiment are made when missing.

    `Unanswered` when MLflow does not answer, another `Refusal` when it does not know the run or the experiment was deleted. A new run with
    the tag `OPENING` may be asked for again.
    """
    with tracking_uri.first_contact(uri):
        try:
            client = connect(uri)
            return client, _new_run(client, uri, experiment, name, tags) if run_id is None else _old_run(client, run_id, tags)
        except trouble() as error:
            where = f"MLflow at {tracking_uri.without_password(uri)}"
            expected = "a tracking server or database that answers" if run_id is None else f"one that answers and has run {run_id}"
            kind = Unanswered if is_passing(error) else Refusal
            raise kind(where, brief(error), expected, "Start it, or set mlflow.tracking_uri in ray_config.yaml.") from error


class Delivery:
    """One run's way from its folder to MLflow. Calls raise `trouble()`; only one thread at a time may be in one."""

    def __init__(self, client: MlflowClient, record: RunRecord, journal: Journal, outbox: Lines):
        self._client, self._run_id, self._experiment_id = client, record.run_id, record.experiment_id
        self._journal, self._outbox = journal, outbox
        self._metrics_read, self._outbox_read = Cursor(), Cursor()
        self._present: dict[str, int] | None = None
        self.students: dict[str, str] = {}
        """`models:/` address of every student delivered, by its key."""

    def push(self) -> None:
        """Everything that the folder holds and MLflow does not."""
        self._push_metrics()
        self._push_outbox()

    def close(self, status: Status) -> None:
        """The rest, and the status. The status is set even when something else is refused."""
        try:
            self.push()
        finally:
            self._client.set_terminated(self._run_id, status)

    def _push_metrics(self) -> None:
        while True:
            rows, after = self._journal.read(self._metrics_read)
            if not rows:
                return
            if after.generation != self._metrics_read.generation:
                self._present = None
            if self._present is None:
                self._present = _highest_steps(self._client.get_run(self._run_id))
            try:
                self._send(rows, self._present)
            except trouble():
                self._present = None  # nobody knows how much of it arrived
                raise
            self._metrics_read = after

    def _send(self, rows: Sequence[MetricRow], present: Mapping[str, int]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics: list[Metric] = []
        tags: list[RunTag] = []
        for row in rows:
            bad = {k: v for k, v in row.values.items() if not math.isfinite(v)}
            values = {clean_key(k): v for k, v in row.values.items() if k not in bad} | ({"nonfinite": float(len(bad))} if bad else {})
            fresh = {k: v for k, v in values.items() if row.step > present.get(k, -1)}
            metrics += [Metric(k, v, round(row.time * 1000), row.step) for k, v in fresh.items()]
            if bad:
                text = ", ".join(f"{k}={v}" for k, v in bad.items())
                tags = [RunTag("nonfinite.last", f"step {row.step}: {text}"[:_TAG_CHARACTERS])]
        for start in range(0, len(metrics), _BATCH_METRICS):
            self._client.log_batch(self._run_id, metrics[start : start + _BATCH_METRICS], tags=tags)

    def _push_outbox(self) -> None:
        while True:
            found, after = self._outbox.read(self._outbox_read, limit=1)
            if after == self._outbox_read:
                return
            for message in found:
                self._tell(message)
            self._outbox_read = after

    def _tell(self, message: Mapping[str, Any]) -> None:
        try:
            if message["kind"] == "params":
                self._tell_params(message["params"])
            elif message["kind"] == "tags":
                self._tell_tags(message["tags"])
            elif message["kind"] == "text":
                self._tell_artifact(lambda: self._client.log_text(self._run_id, message["text"], message["file"]))
            elif message["kind"] == "file":
                self._tell_file(Path(message["path"]))
            else:
                self._tell_student(message)
        except trouble() as error:
            if not is_final(error):
                raise
            logger.warning("MLflow refuses a record of kind %s (%s); it stays in %s.", message["kind"], brief(error), self._outbox.path)

    def _tell_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        run = self._client.get_run(self._run_id).data
        present = run.params
        wanted = {clean_key(k): cut(v, _PARAM_CHARACTERS) for k, v in params.items()}
        new = [Param(k, v) for k, v in wanted.items() if k not in present]
        names = {k: clean_key(f"changed.{k}") for k in wanted}
        changed = [RunTag(names[k], v) for k, v in wanted.items() if present.get(k, v) != v or names[k] in run.tags]
        for batch in _batches(new, _BATCH_PARAMS):
            self._client.log_batch(self._run_id, params=batch)
        self._tell_tags({tag.key: tag.value for tag in changed})

    def _tell_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(clean_key(k), cut(v, _TAG_CHARACTERS)) for k, v in tags.items()], _BATCH_TAGS):
            self._client.log_batch(self._run_id, tags=batch)

    def _tell_file(self, path: Path) -> None:
        if path.is_file():
            self._tell_artifact(lambda: self._client.log_artifact(self._run_id, str(path)))
        else:
            logger.warning("%s is gone, and MLflow does not get it.", path)

    def _tell_artifact(self, log: Callable[[], None]) -> None:
        try:
            log()
        except trouble():
            raise
        except Exception as error:  # artifact stores are plug-ins with errors of their own kinds, and the run outlives them all
            raise OSError(f"the artifact store: {brief(error)}") from error

    def _tell_student(self, student: Mapping[str, Any]) -> None:
        model = self._model_of(student)
        metrics = [self._ranked(key, value, student["step"], model.model_id) for key, value in student["metrics"].items()]
        self._client.log_batch(self._run_id, metrics)
        self._client.finalize_logged_model(model.model_id, "READY")
        self.students[student["key"]] = model.model_uri

    def _model_of(self, student: Mapping[str, Any]) -> LoggedModel:
        key = student["key"]
        for model in self._client.search_logged_models([self._experiment_id], f"source_run_id = '{self._run_id}'"):
            if model.tags.get("student_key") == key:
                return model
        params = student["params"] | {"step": str(student["step"]), "folder": student["folder"]}
        return self._client.create_logged_model(
            self._experiment_id,
            name="student",
            source_run_id=self._run_id,
            params={clean_key(k): cut(v, _MODEL_PARAM_CHARACTERS) for k, v in params.items()},
            tags={"mlflow.model.isExternal": "true", "student_key": key},
        )

    def _ranked(self, key: str, value: float, step: int, model_id: str) -> Metric:
        """A metric of a LoggedModel is one of the run too: it takes the time of the run's own, so that it stays one point."""
        from mlflow.entities import Metric

        key = clean_key(key)
        history = self._client.get_metric_history(self._run_id, key)
        times = [m.timestamp for m in history if m.step == step and m.value == value]
        return Metric(key, value, times[0] if times else round(time.time() * 1000), step, model_id=model_id)


def clean_key(key: str) -> str:
    """A name that MLflow accepts: letters, digits, `_ - . : /` and spaces, at most 250 of them."""
    return re.sub(r"[^\w\-.:/ ]", "_", key)[:_KEY_CHARACTERS]


def cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _highest_steps(run: Run) -> dict[str, int]:
    """The highest step of every metric that MLflow has of the run."""
    return {m.key: m.step for m in run.data.to_proto().metrics}


def _new_run(client: MlflowClient, uri: str, experiment: str, name: str, tags: Mapping[str, str]) -> Run:
    home, key = _experiment_id(client, uri, experiment), tags.get(OPENING)
    known = client.search_runs([home], f"tags.`{OPENING}` = '{key}'", max_results=1) if key else []
    return known[0] if known else client.create_run(home, run_name=name, tags=dict(tags))


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=tracking_uri.artifact_location(uri)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # someone else made it just now
    if found is None or found.lifecycle_stage != "active":
        do = "Restore it with `mlflow experiments restore`, or set another mlflow.experiment in ray_config.yaml."
        raise Refusal(f"MLflow experiment {name!r}", "a deleted experiment", "an active one", do)
    return str(found.experiment_id)


def _old_run(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> Run:
    from mlflow.entities import RunTag

    client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(clean_key(k), cut(v, _TAG_CHARACTERS)) for k, v in tags.items()])
    return client.get_run(run_id)
