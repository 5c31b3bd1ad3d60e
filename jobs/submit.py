"""`distill submit`: a command of this program as a Ray job, with the working tree it runs in."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from cluster.config import ClusterConfig
from cluster.jobs_client import Jobs
from cluster.luggage import Luggage
from cluster.package import Tree
from cluster.storage import Folder
from cluster.yaml_text import read_yaml
from jobs.run import cluster_file
from jobs.submitted import COMMAND, EXPERIMENT, RUN_FOLDER, TRACKING, follow_job, hints, reachable
from orchestrator.config import load_cluster, load_job
from orchestrator.display import console
from orchestrator.errors import Refusal
from orchestrator.naming import fresh_name
from orchestrator.owner import COPY
from orchestrator.result import RECIPE
from orchestrator.search.book import SEARCH
from orchestrator.tracking_uri import absolute

MIB = 1 << 20


@dataclass(frozen=True)
class Command:
    """How one command of this program runs as a job."""

    recipe: bool = False
    """Its words are a recipe and overrides, checked here before anything is sent."""
    resumes: str | None = None
    """A file of its folder that is there once it has begun: from then on another try goes on with it. None where nothing goes on."""
    copied: bool = False
    """That file is one of the driver's own small ones, of which remote storage has a copy."""

    def marker(self, folder: str) -> str:
        """Where that file lies, of a folder or URI."""
        place = f"{folder}/{COPY}" if self.copied and "://" in folder else folder
        return f"{place}/{self.resumes}"


COMMANDS: Mapping[str, Command] = {
    "run": Command(recipe=True, resumes=RECIPE),
    "search": Command(recipe=True, resumes=SEARCH, copied=True),
    "generate": Command(recipe=True),
    "evaluate": Command(),
    "doctor": Command(),
}
WITHOUT_SETTINGS = ("evaluate", "quickstart", "task")
"""Commands that take no `--cluster`."""


@dataclass(frozen=True)
class Asked:
    """What a person wants done, as it is written on the command line."""

    command: str
    words: tuple[str, ...]
    cluster: Path | None = None
    address: str | None = None
    retries: int | None = None
    follow: bool = True


@dataclass(frozen=True)
class Work:
    """What the job does: its name, the words of its first and of every later try, and the folder that its run will have."""

    name: str
    words: tuple[str, ...]
    then: tuple[str, ...]
    folder: str | None = None


def submit(asked: Asked) -> int:
    """Sends the job and follows it; its exit code, or 0 when nobody follows."""
    known = COMMANDS.get(asked.command)
    if known is None:
        do = "Run it here, or submit one of these."
        raise Refusal("distill submit", repr(asked.command), f"one of {', '.join(COMMANDS)}", do)
    asked = replace(asked, words=_apart(asked.words))
    config = load_cluster(cluster_file(asked.cluster))
    storage = Folder.of(config.storage)
    work, tree = _work(asked, known, config), Tree.of(Path.cwd(), without=storage.local)
    check_size(tree, config.jobs.package_mib)
    with reachable():
        jobs = Jobs(asked.address or config.ray_address)
    if known.recipe and not jobs.on_this_machine:
        check_storage(config.storage)
    luggage = Luggage(tree, same_machine=jobs.on_this_machine)
    command = entrypoint(asked, work, config, luggage)
    job_id = f"{work.name}-{secrets.token_hex(2)}"
    out = console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "tree.zip"
        tree.write(archive, luggage.files)
        out.print(f"Job      {job_id} at {jobs.address}", soft_wrap=True)
        out.print(f"Takes    {len(tree.files):,} files of {tree.root}, {archive.stat().st_size / MIB:,.1f} MiB", soft_wrap=True)
        for path in luggage.reached:
            out.print(f"Reaches  {path}: not in the tree, so every node must have it", soft_wrap=True)
        with reachable():
            jobs.submit(job_id, command, archive, environment(config), _metadata(asked, work, config))
    if work.folder:
        out.print(f"Run      {work.folder}", soft_wrap=True)
    if not asked.follow:
        out.print(hints(job_id, asked.address), soft_wrap=True)
        return 0
    return follow_job(jobs, job_id, asked.address)


def _apart(words: Sequence[str]) -> tuple[str, ...]:
    """`--option=value` as two words."""
    return tuple(part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word]))


def check_storage(storage: str) -> None:
    """`Refusal` for a folder that another machine would make somewhere of its own."""
    if "://" in storage or Path(storage).is_absolute():
        return
    do = "Write storage: s3://bucket/runs, or the whole path of a folder that all nodes mount, in ray_config.yaml."
    raise Refusal("storage", f"the relative folder {storage!r}", "a URI or an absolute folder that every node reaches", do)


def check_size(tree: Tree, limit_mib: int) -> None:
    """`Refusal` names what makes the tree too large."""
    if tree.size <= limit_mib * MIB:
        return
    named = "; ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in tree.culprits())
    do = f"Largest: {named}. Name what a job does not need in .rayignore (or .gitignore), or raise jobs.package_mib in ray_config.yaml."
    raise Refusal(f"working tree {tree.root}", f"{tree.size / MIB:,.1f} MiB in {len(tree.files):,} files", f"at most {limit_mib} MiB", do)


def environment(config: ClusterConfig) -> dict[str, str]:
    """Variables of the job's processes. Ray shows and logs them, so nothing secret is among them."""
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(config.jobs.stop_seconds)}
    return {**stop, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", **config.environment}


def entrypoint(asked: Asked, work: Work, config: ClusterConfig, luggage: Luggage) -> str:
    """The job's command line; what it needs besides the tree goes into `luggage`."""
    program = ["python", "-m", "jobs.cli", asked.command]
    where: list[str] = []
    if asked.command not in WITHOUT_SETTINGS:
        where = ["--cluster", luggage.pack("ray_config.yaml", _cluster_content(asked, config, luggage))]
    first = [*program, *luggage.arguments(work.words), *where]
    retries = config.jobs.retries if asked.retries is None else asked.retries
    if not retries:
        return f"exec {shlex.join(first)}"
    then = first if work.then == work.words else [*program, *luggage.arguments(work.then), *where]
    file = COMMANDS[asked.command].marker(work.folder) if work.folder else os.devnull
    return f"exec {shlex.join(['python', '-m', 'cluster.retrying', str(retries), file, '--', *first, '--then', *then])}"


def _cluster_content(asked: Asked, config: ClusterConfig, luggage: Luggage) -> dict[str, object]:
    """`ray_config.yaml` as the job reads it: its own cluster, and storage that is found from any folder."""
    file = cluster_file(asked.cluster)
    content = luggage.content(read_yaml(file)) if file else {}
    uri = config.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri and urlsplit(uri).password:
        do = "Leave it out; give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to the nodes, and list both in `secrets`."
        raise Refusal("mlflow.tracking_uri", "an address with a password", "one without: it is stored with the job", do)
    mlflow = {**config.mlflow.model_dump(), "tracking_uri": uri}
    return {**(content or {}), "address": "auto", "storage": Folder.of(config.storage).root, "mlflow": mlflow}


def _work(asked: Asked, known: Command, config: ClusterConfig) -> Work:
    """`Refusal` for a recipe that would be refused anyway."""
    words = asked.words
    stamp = f"{asked.command}-{datetime.now():%Y%m%d-%H%M%S}"
    if not known.recipe:
        return Work(stamp, words, words)
    resumed = words[words.index("--resume") + 1] if "--resume" in words[:-1] else None
    if resumed is not None and known.resumes:
        folder = Folder.of(resumed).root
        return Work(f"{Path(folder).name}-resumed-{datetime.now():%H%M%S}", words, words, folder)
    if not words or words[0].startswith("-"):
        raise Refusal(f"distill submit {asked.command}", "no recipe", "a recipe first", "Name one, then overrides and options.")
    recipe = Path(words[0])
    job = load_job(recipe, [w for w in words[1:] if not w.startswith("-")], cluster_file(asked.cluster))
    if not known.resumes:
        return Work(stamp, words, words)
    name = job.run.name or fresh_name(config.storage, recipe.stem)
    folder = Folder.of(config.storage, name).root
    return Work(re.sub(r"[^\w.-]", "-", name), (*words, f"name={name}"), ("--resume", folder), folder)


def _metadata(asked: Asked, work: Work, config: ClusterConfig) -> dict[str, str]:
    """What `distill jobs status` needs to know; a password was refused before."""
    said = {COMMAND: shlex.join(["distill", asked.command, *asked.words])}
    if work.folder is None:
        return said
    return {**said, RUN_FOLDER: work.folder, TRACKING: absolute(config.tracking_uri), EXPERIMENT: config.mlflow.experiment}
