"""Small questions to MLflow outside of any run: does it take what a run sends, and which run belongs to a job."""

from __future__ import annotations

import math
import time

from orchestrator import tracking_uri
from orchestrator.delivery import brief, connect, open_run, trouble
from orchestrator.errors import Refusal

JOB_TAG = "ray.job"
"""MLflow tag that names the submitted job of a run, as `distill jobs status` takes it."""
_VALUE = math.pi


def roundtrip(uri: str, experiment: str) -> str:
    """Writes a run with a metric, reads it back and deletes it; the page of it. `Refusal` says what does not work."""
    uri = tracking_uri.absolute(uri)
    client, run = open_run(uri, experiment, "doctor", {"distill.doctor": "true"}, None)
    try:
        client.log_metric(run.info.run_id, "value", _VALUE, timestamp=int(time.time() * 1000), step=1)
        found = client.get_run(run.info.run_id).data.metrics.get("value")
        client.set_terminated(run.info.run_id)
        client.delete_run(run.info.run_id)
    except trouble() as error:
        do = "Look at the server's log and disk."
        raise Refusal(f"MLflow at {tracking_uri.without_password(uri)}", brief(error), "a run written and read", do) from error
    if found != _VALUE:
        raise Refusal(f"MLflow at {tracking_uri.without_password(uri)}", f"{found} for a metric of {_VALUE}", "the same", "Do not use it.")
    return tracking_uri.page(uri, run.info.experiment_id, run.info.run_id)


def page_of_job(uri: str, experiment: str, job: str) -> str | None:
    """The page and id of the newest run of a submitted job; None when MLflow knows none, or does not answer."""
    uri = tracking_uri.absolute(uri)
    path = tracking_uri.sqlite_path(uri)
    if path is not None and not path.exists():
        return None
    try:
        client = connect(uri)
        home = client.get_experiment_by_name(experiment)
        found = client.search_runs([home.experiment_id], f"tags.`{JOB_TAG}` = '{job}'", max_results=1) if home else []
    except trouble():
        return None
    if not found:
        return None
    info = found[0].info
    return f"{tracking_uri.page(uri, info.experiment_id, info.run_id)} (run {info.run_id}, {info.status})"
