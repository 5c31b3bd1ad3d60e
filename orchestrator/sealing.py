"""The key that a run's checkpoints are sealed with, or what to do about one that cannot be used."""

from __future__ import annotations

from cluster import seal
from cluster.config import ClusterConfig
from orchestrator.errors import Refusal


def sealing_key(cluster: ClusterConfig) -> seal.Key:
    """The key of whoever drives, made when there is none yet. `Refusal` when there can be none."""
    try:
        return seal.key_of(cluster.seal)
    except seal.NoKey as error:
        do = "Correct that, or name under seal.key_env in ray_config.yaml a variable that holds a key."
        raise Refusal("seal", str(error), "a key that seals checkpoints", do) from error


def check_key(cluster: ClusterConfig) -> None:
    """`Refusal` when there is a key that cannot be used. Makes none."""
    if cluster.seal.key_env is not None or seal.key_file().exists():
        sealing_key(cluster)
