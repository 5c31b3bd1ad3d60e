"""The commands that deal with clusters: `distill submit`, `distill jobs ...` and `distill cluster ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

jobs_app = typer.Typer(name="jobs", help="See, follow and stop submitted jobs.", no_args_is_help=True)
cluster_app = typer.Typer(name="cluster", help="Start a cluster on this machine, or write the files that start one.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(help="A Jobs URL (http://host:8265), host:port, auto, or local.", show_default="that of the settings"),
]
Settings = Annotated[
    Path | None, typer.Option("--cluster", help="The settings to use.", show_default="ray_config.yaml of this folder, if there is one")
]
JobId = Annotated[str, typer.Argument(help="As `distill jobs list` shows it.")]
Name = Annotated[str, typer.Option(help="Several clusters have several names.")]


def submit(
    command: Annotated[str, typer.Argument(help="run, search, generate, evaluate or doctor.")],
    words: Annotated[list[str] | None, typer.Argument(help="What the command takes: a recipe, overrides, options.")] = None,
    address: Address = None,
    cluster: Settings = None,
    retries: Annotated[
        int | None, typer.Option(min=0, help="Times to start it again when it fails.", show_default="jobs.retries of the settings")
    ] = None,
    follow: Annotated[bool, typer.Option(help="Print what it says until it ends.")] = True,
) -> None:
    """Run a command on a Ray cluster, with this working tree; the job goes on when you leave."""
    from jobs.submit import Asked, submit

    raise typer.Exit(submit(Asked(command, tuple(words or ()), cluster, address, retries, follow)))


@jobs_app.command("list")
def list_jobs(address: Address = None, cluster: Settings = None) -> None:
    """List the cluster's jobs."""
    from jobs.submitted import jobs_of, show_jobs

    show_jobs(jobs_of(address, cluster))


@jobs_app.command()
def status(job: JobId, address: Address = None, cluster: Settings = None) -> None:
    """Show what a job does, and its run in MLflow."""
    from jobs.submitted import jobs_of, show_status

    show_status(jobs_of(address, cluster), job, address)


@jobs_app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends; exit as it did.")] = False,
    address: Address = None,
    cluster: Settings = None,
) -> None:
    """Print what a job says."""
    from jobs.submitted import jobs_of, show_logs

    raise typer.Exit(show_logs(jobs_of(address, cluster), job, follow, address))


@jobs_app.command()
def stop(job: JobId, address: Address = None, cluster: Settings = None) -> None:
    """End a job; a run writes a checkpoint first."""
    from jobs.submitted import jobs_of, stop_job

    raise typer.Exit(stop_job(jobs_of(address, cluster), job))


@cluster_app.command()
def up(
    nodes: Annotated[int, typer.Option(min=1, max=32, help="The head included.")] = 2,
    cpus: Annotated[int, typer.Option(min=0, help="Logical CPUs of each node.")] = 2,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each node.")] = 0,
    object_store_mib: Annotated[int, typer.Option(min=80, help="Object store of each node, in MiB.")] = 256,
    name: Name = "loopback",
) -> None:
    """Start a Ray cluster of several nodes on this machine."""
    from jobs.loopback import start

    start(name, nodes, cpus, gpus, object_store_mib)


@cluster_app.command("status")
def cluster_status() -> None:
    """Show the clusters that run on this machine."""
    from jobs.loopback import show

    show()


@cluster_app.command()
def down(name: Name = "loopback") -> None:
    """End a cluster that `up` started, and nothing else."""
    from jobs.loopback import end

    end(name)


@cluster_app.command(
    context_settings={"ignore_unknown_options": True},
    epilog="For example: distill cluster render rayjob run jobs/recipes/seq_kd_qwen3_0.6b_from_8b_1gpu.yaml --output job.yaml",
)
def render(
    what: Annotated[Literal["raycluster", "rayjob", "launcher", "docker"], typer.Argument(help="Which file.")],
    words: Annotated[list[str] | None, typer.Argument(help="With rayjob: the command and what it takes.", show_default=False)] = None,
    cluster: Settings = None,
    output: Annotated[Path | None, typer.Option(help="A file.", show_default="standard output")] = None,
) -> None:
    """Write the file that starts a cluster elsewhere, from ray_config.yaml."""
    from jobs.render import write

    write(what, words or [], cluster, output)


def doctor(cluster: Settings = None) -> None:
    """Check versions, ports, memory, disk, GPUs, storage, MLflow and Ray, and say what to do."""
    from jobs.doctor import examine

    raise typer.Exit(examine(cluster))
