"""`distill cluster render`: files that start a cluster elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.deploy.docker import FOLDERS, dockerfile
from cluster.deploy.kuberay import ray_cluster, ray_job, storage_path
from cluster.deploy.launcher import launcher
from cluster.storage import Folder
from cluster.yaml_text import write_yaml
from jobs.run import CLUSTER, cluster_file
from jobs.submit import COMMANDS, WITHOUT_SETTINGS, Command
from orchestrator.config import load_cluster, load_job
from orchestrator.errors import Refusal
from orchestrator.naming import stamped

PROGRAM = ("python", "-m", "jobs.cli")
EXAMPLE = "distill cluster render rayjob run jobs/recipes/seq_kd_qwen3_0.6b_from_8b_1gpu.yaml"


def write(what: str, words: Sequence[str], cluster: Path | None, output: Path | None) -> None:
    """Prints one of them, or puts it into a file."""
    file = cluster_file(cluster)
    text = rendered(what, words, load_cluster(file), file)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


def rendered(what: str, words: Sequence[str], config: ClusterConfig, cluster: Path | None = None) -> str:
    """Text of the file; `Refusal` for words that it has no use for."""
    if (what == "rayjob") != bool(words):
        got = "no command" if what == "rayjob" else f"a command, {words[0]!r}"
        do = f"{EXAMPLE}, for example; the recipe is taken from the image."
        raise Refusal(f"distill cluster render {what}", got, "a command with rayjob, and with nothing else", do)
    if what == "docker":
        return dockerfile(config.environment)
    if what != "launcher" and "://" not in config.storage and config.nodes.claim is None:
        do = "Set nodes.claim to a PersistentVolumeClaim, or storage to a URI such as s3://bucket/runs."
        raise Refusal("storage", f"the folder {config.storage!r}", "what outlives a pod", do)
    if what == "rayjob":
        return write_yaml(ray_job(config, _tries(words, config, cluster), f"{config.nodes.name}-{words[0]}"))
    return write_yaml(ray_cluster(config) if what == "raycluster" else launcher(config))


def _tries(words: Sequence[str], config: ClusterConfig, cluster: Path | None) -> list[str]:
    """The command, started again when it fails as `distill submit` does it: under a fixed name, so that a later try goes on."""
    known, where = COMMANDS.get(words[0], Command()), _settings(words[0], cluster)
    once = [*PROGRAM, *words, *where]
    first, then, file = once, once, os.devnull
    if known.recipe and not any(word.startswith("--resume") for word in words):
        recipe = _in_image(words)
        name = load_job(recipe, [w for w in words[2:] if not w.startswith("-")], cluster).run.name or stamped(recipe.stem)
        if known.resumes:
            folder = Folder.of(config.storage if "://" in config.storage else storage_path(config), name).root
            first, file = [*PROGRAM, *words, f"name={name}", *where], known.marker(folder)
            then = [*PROGRAM, words[0], "--resume", folder, *where]
    retries = config.jobs.retries
    return ["python", "-m", "cluster.retrying", str(retries), file, "--", *first, "--then", *then] if retries else once


def _settings(command: str, cluster: Path | None) -> list[str]:
    """Words that name the settings, where the image's `ray_config.yaml` is another file; `Refusal` for one that the image does not hold."""
    if cluster is None or command in WITHOUT_SETTINGS:
        return []
    path = os.path.relpath(cluster.parent.resolve() / cluster.name)
    if path == str(CLUSTER):
        return []
    if path.partition(os.sep)[0] not in FOLDERS:
        do = f"Put it under jobs/ and build the image anew (`distill cluster render docker`), or make it the {CLUSTER} of this folder."
        expected = f"{CLUSTER}, or a path below {', '.join(FOLDERS)}"
        raise Refusal(f"distill cluster render rayjob {command}", f"--cluster {cluster}, which is not in the image", expected, do)
    return ["--cluster", path]


def _in_image(words: Sequence[str]) -> Path:
    """The recipe; `Refusal` for one that the image does not hold."""
    where = f"distill cluster render rayjob {words[0]}"
    if len(words) < 2 or words[1].startswith("-"):
        raise Refusal(where, "no recipe", "a recipe first", f"{EXAMPLE}, for example.")
    path = os.path.normpath(words[1])
    if path.partition(os.sep)[0] not in FOLDERS:
        do = "Put it under jobs/recipes/ and build the image anew (`distill cluster render docker`)."
        raise Refusal(where, f"{words[1]!r}, which is not in the image", f"a path below {', '.join(FOLDERS)}", do)
    return Path(path)
