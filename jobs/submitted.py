"""`distill jobs`: what became of submitted jobs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.table import Table

from cluster.jobs_client import STOPPED, Job, Jobs, NoSuchJob, Unreachable
from orchestrator import tracking_uri
from orchestrator.config import load_cluster
from orchestrator.display import console
from orchestrator.errors import Refusal
from orchestrator.journal import RunRecord
from orchestrator.roundtrip import page_of_job

RUN_FOLDER, COMMAND, TRACKING, EXPERIMENT = "run_folder", "command", "mlflow_tracking_uri", "mlflow_experiment"
"""What a job's metadata says: the folder of its run, what it was asked to do, and where MLflow keeps it."""


@contextmanager
def reachable() -> Iterator[None]:
    """Turns what a cluster does not do into a `Refusal`."""
    try:
        yield
    except Unreachable as error:
        raise Refusal(f"Ray jobs at {error.address}", error.reason, "a cluster that takes jobs", error.do) from error
    except NoSuchJob as error:
        raise Refusal(f"job {error}", "no such job", "one that this cluster knows", "`distill jobs list` lists them.") from error


def jobs_of(address: str | None, cluster: Path | None) -> Jobs:
    """The jobs of the cluster that is named, else of the one in `ray_config.yaml`."""
    with reachable():
        return Jobs(address or load_cluster(cluster).ray_address)


def show_jobs(jobs: Jobs) -> None:
    with reachable():
        found = jobs.all()
    if not found:
        console().print(f"No jobs at {jobs.address}. `distill submit run RECIPE` makes one.", soft_wrap=True)
        return
    table = Table(title=f"Jobs at {jobs.address}", title_justify="left")
    for name in ("job", "status", "began", "took", "command"):
        table.add_column(name, overflow="fold", no_wrap=name in ("status", "began", "took"))
    for job in found:
        table.add_row(job.id, job.status, _time(job.began), _took(job), job.metadata.get(COMMAND, job.command))
    console().print(table)


def show_status(jobs: Jobs, job_id: str, address: str | None) -> None:
    """What a job does, and where its run is."""
    with reachable():
        job = jobs.job(job_id)
    out = console()
    code = "" if job.exit_code is None else f", exit code {job.exit_code}"
    lines = {"Job": job.id, "Status": f"{job.status}{code}", "Command": job.metadata.get(COMMAND, job.command)}
    lines |= {"Began": _time(job.began), "Took": _took(job)} if job.began else {}
    lines |= {"Says": job.message.strip().splitlines()[0]} if job.message.strip() else {}
    for name, value in {**lines, **run_of(job)}.items():
        out.print(f"{name:<9}{value}", soft_wrap=True)
    out.print(hints(job_id, address), soft_wrap=True)


def run_of(job: Job) -> Mapping[str, str]:
    """The run of a job and where MLflow shows it: by the run's folder when it can be read from here, else by the job's tag."""
    folder = job.metadata.get(RUN_FOLDER)
    if folder is None:
        return {}
    record = None if "://" in folder else RunRecord.load(Path(folder))
    if record is not None:
        page = f"{tracking_uri.page(record.uri, record.experiment_id, record.run_id)} (run {record.run_id}, {record.status})"
    else:
        page = page_of_job(job.metadata.get(TRACKING, ""), job.metadata.get(EXPERIMENT, ""), job.id) or "knows no run of it yet"
    return {"Run": folder, "MLflow": page}


def show_logs(jobs: Jobs, job_id: str, follow: bool, address: str | None) -> int:
    """All that the job printed; with `follow`, until it ends, and then its exit code."""
    if follow:
        return follow_job(jobs, job_id, address)
    with reachable():
        sys.stdout.write(jobs.logs(job_id))
    return 0


def stop_job(jobs: Jobs, job_id: str) -> int:
    """Asks a job to end and waits until it has."""
    with reachable():
        asked = jobs.stop(job_id)
        console(stderr=True).print("Stopping; a run writes a checkpoint first ..." if asked else "It had ended already.")
        job = jobs.wait(job_id) if asked else jobs.job(job_id)
    console().print(f"{job.id}: {job.status}")
    return 0


def follow_job(jobs: Jobs, job_id: str, address: str | None) -> int:
    """Prints what a job says until it ends; its exit code. Ctrl-C ends the watching and nothing else."""
    err = console(stderr=True)
    try:
        with reachable():
            job = jobs.follow(job_id, _write)
    except KeyboardInterrupt:
        err.print(f"\nNo longer following {job_id}; it goes on.\n{hints(job_id, address)}", soft_wrap=True)
        return STOPPED
    err.print(f"{job.id}: {job.status}" + (f", exit code {job.exit_code}" if job.exit_code else ""), soft_wrap=True)
    if job.exit_code is None and job.status == "FAILED":
        err.print(job.message, soft_wrap=True)
    return job.outcome


def hints(job_id: str, address: str | None) -> str:
    """What to type next."""
    at = f" --address {address}" if address else ""
    words = {"Follow": "logs --follow", "Status": "status", "Stop": "stop"}
    return "\n".join(f"{name:<9}distill jobs {word} {job_id}{at}" for name, word in words.items())


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _took(job: Job) -> str:
    if job.began is None:
        return "-"
    seconds = (job.ended or datetime.now().timestamp()) - job.began
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
