"""The YAML of Ray's cluster launcher (`ray up`): machines of a cloud, or of one's own."""

from __future__ import annotations

from typing import Any

from cluster.config import ClusterConfig
from cluster.node_settings import Node

TOKEN = "~/.ray/auth_token"
"""Here and on every node; `ray get-auth-token --generate` makes it."""
_SHM_SHARE = 0.3


def launcher(config: ClusterConfig) -> dict[str, Any]:
    """`available_node_types` have a head and one type for each group; a provider without types, such as `local`, takes none of them."""
    nodes = config.nodes
    types = {"head": {"resources": {"CPU": 0}, "node_config": dict(nodes.head.machine), "min_workers": 0, "max_workers": 0}}
    for name, group in nodes.groups.items():
        sizes: dict[str, Any] = {"min_workers": group.min, "max_workers": group.max}
        types[name] = {"resources": _resources(group), "node_config": dict(group.machine), **sizes}
    typed = nodes.provider.get("type") != "local"
    largest = max([nodes.head, *nodes.groups.values()], key=lambda node: node.memory_gib)
    content: dict[str, Any] = {
        "cluster_name": nodes.name,
        "max_workers": sum(group.max for group in nodes.groups.values()),
        "provider": dict(nodes.provider),
        "auth": {"ssh_user": nodes.ssh_user},
        "docker": {"image": nodes.image, "container_name": "distill", "run_options": _run_options(config, largest)},
        "file_mounts": {TOKEN: TOKEN},
        "head_start_ray_commands": [
            "ray stop",
            _start("--head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"),
        ],
        "worker_start_ray_commands": ["ray stop", _start("--address=$RAY_HEAD_IP:6379")],
    }
    return content | ({"available_node_types": types, "head_node_type": "head"} if typed else {})


def _resources(node: Node) -> dict[str, int]:
    return {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})


def _start(words: str) -> str:
    return f"ulimit -n 65536; RAY_AUTH_MODE=token ray start --disable-usage-stats {words}"


def _run_options(config: ClusterConfig, largest: Node) -> list[str]:
    shm = f"--shm-size={max(1, int(largest.memory_gib * _SHM_SHARE))}g"
    plain = [f"--env {name}={value}" for name, value in config.environment.items()]
    return ["--ulimit nofile=65536:65536", shm, *plain, *(f"--env {name}" for name in config.secrets)]
