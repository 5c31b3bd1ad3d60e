"""Jobs on a real Ray: sent, followed, stopped, and told apart by how they ended."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import jobs_client, loopback
from cluster.inside import inside_job, submission_id
from cluster.jobs_client import Job, Jobs, NoSuchJob, Unreachable
from cluster.package import Tree


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of one program that prints, waits and ends as it is told. It takes Ctrl-C also below a shell that ignores it, as in `&`."""
    root = tmp_path_factory.mktemp("tree")
    (root / "program.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('first line', os.environ['WORD'], flush=True)\n"
        "time.sleep(float(sys.argv[1]))\n"
        "print('last line')\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    tree = Tree.of(root)
    tree.write(root.parent / "tree.zip", {})
    return root.parent / "tree.zip"


def test_a_job_is_followed_to_its_end_and_ends_as_its_command_did(ray_session: str, archive: Path) -> None:
    jobs = Jobs(ray_session)
    jobs.submit("followed", "exec python program.py 1 7", archive, {"WORD": "hello"}, {"run_folder": "/runs/a"})
    told: list[str] = []
    job = jobs.follow("followed", told.append)
    assert (job.status, job.exit_code, job.outcome, job.over) == ("FAILED", 7, 7, True)
    assert "first line hello" in "".join(told)
    assert "".join(told).count("last line") == 1
    assert "".join(told) == jobs.logs("followed")
    assert job.metadata["run_folder"] == "/runs/a"
    assert "followed" in [j.id for j in jobs.all()]


def test_a_stopped_job_ends_by_ctrl_c_and_is_told_apart(ray_session: str, archive: Path) -> None:
    jobs = Jobs(ray_session)
    stopping = {"WORD": "x", "RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "20"}
    jobs.submit("stopped", "exec python program.py 600 0", archive, stopping, {})

    def stop_at_the_first_line(text: str) -> None:
        if "first line" in text:
            assert jobs.stop("stopped")

    job = jobs.follow("stopped", stop_at_the_first_line)
    assert (job.status, job.outcome) == ("STOPPED", 130)
    assert "KeyboardInterrupt" in jobs.logs("stopped")
    with pytest.raises(NoSuchJob):
        jobs.job("nobody")


class Breaking:
    """Instead of Ray's client: the connection breaks while a job prints, and the dashboard is away once."""

    def __init__(self, address: str, headers: object):
        self.asked = 0

    def get_address(self) -> str:
        return "http://head:8265"

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        self.asked += 1
        if self.asked == 2:
            raise ConnectionError("nobody there")
        status = "RUNNING" if self.asked < 4 else "SUCCEEDED"
        fields = {"submission_id": job_id, "message": "", "entrypoint": "", "metadata": None, "start_time": 1, "end_time": None}
        return SimpleNamespace(**fields, status=status, driver_exit_code=None if status == "RUNNING" else 0)

    def list_jobs(self) -> list[SimpleNamespace]:
        return []

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "one\n"
        yield "two\nth"
        if self.asked < 4:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield "ree\n"


def test_what_is_followed_is_told_once_when_the_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_client, "JobSubmissionClient", Breaking)
    monkeypatch.setattr(jobs_client, "POLL_SECONDS", 0.0)
    told: list[str] = []
    assert Jobs("http://head:8265").follow("a", told.append).status == "SUCCEEDED"
    assert "".join(told) == "one\ntwo\nthree\n"


def test_a_cluster_that_has_just_begun_is_waited_for(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    class Beginning(Breaking):
        def submit_job(self, **job: object) -> None:
            self.asked += 1
            if self.asked < 3:
                raise RuntimeError("Request failed with status code 500: No available agent to submit job, please try again later.")
            if self.asked > 3:
                raise RuntimeError("Request failed with status code 500: no such file")

    monkeypatch.setattr(jobs_client, "JobSubmissionClient", Beginning)
    monkeypatch.setattr(jobs_client, "POLL_SECONDS", 0.0)
    jobs = Jobs("http://head:8265")
    jobs.submit("a", "true", archive, {}, {})
    with pytest.raises(Unreachable, match="no such file"):
        jobs.submit("b", "true", archive, {}, {})


def test_outcomes() -> None:
    def outcome(status: str, code: int | None) -> int:
        return Job("a", status, "", "", {}, None, None, code).outcome

    assert outcome("SUCCEEDED", 0) == 0
    assert outcome("FAILED", 3) == 3
    assert outcome("FAILED", None) == 1  # its command never ran
    assert outcome("STOPPED", None) == 130


def test_nobody_at_an_address_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "running", list)
    with pytest.raises(Unreachable, match="no clusters on this machine"):
        Jobs("local")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="Failed to connect"):
            Jobs(f"http://127.0.0.1:{free.getsockname()[1]}")


def test_a_driver_knows_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert not inside_job()
    assert submission_id() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}, "metadata": {"job_submission_id": "run-1"}}')
    assert inside_job()
    assert submission_id() == "run-1"
