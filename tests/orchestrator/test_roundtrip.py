"""What MLflow is asked outside of runs."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from orchestrator.delivery import connect, open_run
from orchestrator.errors import Refusal
from orchestrator.roundtrip import JOB_TAG, page_of_job, roundtrip


def test_a_run_is_written_read_and_gone(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert uri in roundtrip(uri, "distill")
    client = connect(uri)
    experiment = client.get_experiment_by_name("distill")
    assert client.search_runs([experiment.experiment_id]) == []


def test_a_server_that_is_not_there_is_a_refusal_without_its_password() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Refusal, match="MLflow at http://127") as refused:
            roundtrip(f"http://me:very_secret@127.0.0.1:{free.getsockname()[1]}", "distill")
    assert "very_secret" not in str(refused.value)


def test_a_jobs_newest_run_is_found_by_its_tag(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert page_of_job(uri, "distill", "mine") is None
    assert not (tmp_path / "mlflow.db").exists()  # asking makes nothing
    for job in ("other", "mine"):
        _, run = open_run(uri, "distill", job, {JOB_TAG: job}, None)
    assert f"run {run.info.run_id}, RUNNING" in (page_of_job(uri, "distill", "mine") or "")
    assert page_of_job(uri, "distill", "nobody") is None
    assert page_of_job(uri, "elsewhere", "mine") is None
