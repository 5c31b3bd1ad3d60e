"""`distill cluster render`: files that start a cluster elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config import ClusterConfig, write_yaml
from cluster.deploy.docker import dockerfile
from cluster.deploy.kuberay import ray_cluster, ray_job
from cluster.deploy.launcher import launcher
from jobs.run import cluster_file
from orchestrator.config import load_cluster
from orchestrator.errors import Refusal


def write(what: str, words: Sequence[str], cluster: Path | None, output: Path | None) -> None:
    """Prints one of them, or puts it into a file."""
    text = rendered(what, words, load_cluster(cluster_file(cluster)))
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


def rendered(what: str, words: Sequence[str], config: ClusterConfig) -> str:
    """Text of the file; `Refusal` for words that it has no use for."""
    if (what == "rayjob") != bool(words):
        got = "no command" if what == "rayjob" else f"a command, {words[0]!r}"
        do = "distill cluster render rayjob run jobs/recipes/tiny_logits.yaml, for example; the recipe is taken from the image."
        raise Refusal(f"distill cluster render {what}", got, "a command with rayjob, and with nothing else", do)
    if what == "docker":
        return dockerfile(config.environment)
    if what != "launcher" and "://" not in config.storage and config.nodes.claim is None:
        do = "Set nodes.claim to a PersistentVolumeClaim, or storage to a URI such as s3://bucket/runs."
        raise Refusal("storage", f"the folder {config.storage!r}", "what outlives a pod", do)
    if what == "rayjob":
        return write_yaml(ray_job(config, ["python", "-m", "jobs.cli", *words], f"{config.nodes.name}-{words[0]}"))
    return write_yaml(ray_cluster(config) if what == "raycluster" else launcher(config))
