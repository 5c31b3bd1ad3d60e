"""Ray Jobs: where a cluster takes them, sending one, following it, and what became of it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobSubmissionClient

from cluster import loopback

START_SECONDS = 60.0
"""Until the agent of a head that has just begun takes jobs, at most."""
NO_AGENT = "No available agent"
"""What Ray says until then."""
POLL_SECONDS = 0.5
SILENCE_SECONDS = 60.0
"""A cluster that does not answer for so long is given up."""
STOPPED = 130
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's client puts above the address it is given."""
_TALKERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


class Unreachable(Exception):
    """No cluster takes jobs at an address."""

    def __init__(self, address: str, reason: str, do: str):
        self.address, self.reason, self.do = address, reason, do
        super().__init__(f"{address}: {reason}. {do}")


class NoSuchJob(Exception):
    """The cluster knows no job of that id."""


@dataclass(frozen=True)
class Job:
    """What the cluster says of one job. It holds no values of the environment."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    command: str
    metadata: Mapping[str, str]
    began: float | None
    """Unix seconds."""
    ended: float | None
    exit_code: int | None
    """Of its command; None while it runs, and when it never did."""

    @property
    def over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def outcome(self) -> int:
        """Exit code for whoever waited for it: its command's own, 1 when there is none, 130 when it was stopped."""
        if self.status == "STOPPED":
            return STOPPED
        return 0 if self.status == "SUCCEEDED" else self.exit_code or 1


class Jobs:
    """The jobs of one cluster. Methods raise `Unreachable` when it does not answer, `NoSuchJob` for an id it does not know."""

    def __init__(self, address: str):
        """`address` is a Jobs URL, `host:port`, `auto`, `ray://host:port`, or `local`: the cluster of `distill cluster up`.

        The token comes from RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token when RAY_AUTH_MODE is `token`, as in
        all of Ray; that of a loopback cluster from its own folder.
        """
        for name in _TALKERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        here = loopback.serving(address)
        self.on_this_machine = here is not None
        self.address = here.dashboard if here else address
        if address == "local" and here is None:
            found = len(loopback.running())
            do = "Start one with `distill cluster up`, or name a cluster with --address or in ray_config.yaml."
            raise Unreachable("local", f"{found or 'no'} clusters on this machine", do)
        headers = {"Authorization": f"Bearer {here.token}"} if here else None
        with _asking(self.address), _undisturbed(self.address):
            self._client = JobSubmissionClient(self.address, headers=headers)
        self.address = self._client.get_address()

    def submit(self, job_id: str, command: str, archive: Path, environment: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        """Sends an archive and has `command` run in it, by a shell, on the head node. A cluster that has just begun is waited for."""
        env = {"working_dir": str(archive), "env_vars": dict(environment)}
        last = time.monotonic() + START_SECONDS
        while True:
            try:
                with _asking(self.address):
                    self._client.submit_job(entrypoint=command, submission_id=job_id, runtime_env=env, metadata=dict(metadata))
            except Unreachable as error:
                if NO_AGENT not in str(error) or time.monotonic() > last:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return

    def job(self, job_id: str) -> Job:
        with _asking(self.address, job_id):
            return _job(self._client.get_job_info(job_id))

    def all(self) -> list[Job]:
        """Every submitted job of the cluster, oldest first."""
        with _asking(self.address):
            found = [_job(d) for d in self._client.list_jobs() if d.submission_id]
        return sorted(found, key=lambda job: job.began or 0.0)

    def logs(self, job_id: str) -> str:
        """All that its command has printed so far."""
        with _asking(self.address, job_id):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> bool:
        """Asks a job to end; False when it had ended already. Returns at once."""
        with _asking(self.address, job_id):
            return bool(self._client.stop_job(job_id))

    def follow(self, job_id: str, write: Callable[[str], object]) -> Job:
        """Hands on what the job prints until it is over; goes on where it was when the connection breaks."""
        once, answered = _Once(write), time.monotonic()
        while True:
            try:
                job = self._started(job_id)
                if not job.over or job.exit_code is not None or job.status == "STOPPED":
                    asyncio.run(self._tail(job_id, once))
                return self.wait(job_id)
            except (RuntimeError, aiohttp.ClientError, OSError, Unreachable) as error:
                answered = time.monotonic() if self._answers() else answered
                if time.monotonic() - answered > SILENCE_SECONDS:
                    raise Unreachable(self.address, f"no answer for {SILENCE_SECONDS:g} seconds", "The job may go on.") from error
                time.sleep(POLL_SECONDS)

    def _started(self, job_id: str) -> Job:
        while (job := self.job(job_id)).status == "PENDING":
            time.sleep(POLL_SECONDS)
        return job

    def wait(self, job_id: str) -> Job:
        """The job once it is over."""
        while not (job := self.job(job_id)).over:
            time.sleep(POLL_SECONDS)
        return job

    def _answers(self) -> bool:
        try:
            self.all()
        except Unreachable:
            return False
        return True

    async def _tail(self, job_id: str, once: _Once) -> None:
        once.begin()
        async for text in self._client.tail_job_logs(job_id):
            once.tell(text)


class _Once:
    """Hands on a text that may be told from its beginning several times, each character once."""

    def __init__(self, write: Callable[[str], object]):
        self._write, self._told, self._heard = write, 0, 0

    def begin(self) -> None:
        self._heard = 0

    def tell(self, text: str) -> None:
        self._heard += len(text)
        if (new := self._heard - self._told) > 0:
            self._told = self._heard
            self._write(text[-new:])


@contextmanager
def _asking(address: str, job_id: str = "") -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        do = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token."
        raise Unreachable(address, "it asks for another token", do) from error
    except (OSError, RayError, ValueError) as error:  # what requests raises is an OSError
        do = "Check the address, and that its dashboard runs; `distill doctor` looks at both."
        raise Unreachable(address, _first_line(error), do) from error
    except RuntimeError as error:
        if job_id and "does not exist" in str(error):
            raise NoSuchJob(job_id) from error
        raise Unreachable(address, _first_line(error), "`distill doctor` looks at the cluster.") from error


@contextmanager
def _undisturbed(address: str) -> Iterator[None]:
    """Without the variables that stand above an address; `auto` is what they say."""
    before = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ and address != "auto"}
    try:
        yield
    finally:
        os.environ.update(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _job(details: Any) -> Job:
    return Job(
        id=str(details.submission_id),
        status=str(details.status),
        message=str(details.message or ""),
        command=str(details.entrypoint),
        metadata=dict(details.metadata or {}),
        began=None if details.start_time is None else details.start_time / 1000,
        ended=None if details.end_time is None else details.end_time / 1000,
        exit_code=details.driver_exit_code,
    )
