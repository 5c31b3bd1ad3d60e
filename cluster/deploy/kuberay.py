"""KubeRay manifests (`ray.io/v1`): a RayCluster that stays, or a RayJob that brings its own.

Token authentication is KubeRay's `authOptions`, from its 1.5.1 on: the operator makes the token and gives it to every pod.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Sequence
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.node_settings import Node, NodeGroup

API = "ray.io/v1"
SHM_SHARE = 0.3
"""Of a pod's memory that may be its object store."""
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
FINISHED_SECONDS = 600
"""A RayJob's cluster stays so long after its job, for whoever looks for the reason."""

Manifest = dict[str, Any]


def ray_cluster(config: ClusterConfig) -> Manifest:
    """A cluster to which `distill submit` sends jobs."""
    return {"apiVersion": API, "kind": "RayCluster", "metadata": {"name": config.nodes.name}, "spec": cluster_spec(config)}


def ray_job(config: ClusterConfig, command: Sequence[str], name: str) -> Manifest:
    """A job with a cluster of its own that ends with it; `command` is found in the image. It tries again by itself:
    KubeRay's own retries bring a new cluster each, for what was refused, too."""
    spec = {
        "entrypoint": shlex.join(command),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": FINISHED_SECONDS,
        "backoffLimit": 0,
        "rayClusterSpec": cluster_spec(config),
    }
    return {"apiVersion": API, "kind": "RayJob", "metadata": {"name": name}, "spec": spec}


def cluster_spec(config: ClusterConfig) -> Manifest:
    nodes = config.nodes
    head = {"rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"}, "template": _pod(config, nodes.head, "ray-head", PORTS)}
    return {
        "rayVersion": ray.__version__,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": any(group.min < group.max for group in nodes.groups.values()),
        "headGroupSpec": head,
        "workerGroupSpecs": [_group(config, name, group) for name, group in nodes.groups.items()],
    }


def _group(config: ClusterConfig, name: str, group: NodeGroup) -> Manifest:
    return {
        "groupName": name,
        "replicas": group.min,
        "minReplicas": group.min,
        "maxReplicas": group.max,
        "rayStartParams": {},
        "template": _pod(config, group, "ray-worker", {}),
    }


def _pod(config: ClusterConfig, node: Node, name: str, ports: dict[str, int]) -> Manifest:
    amounts: dict[str, Any] = {"cpu": node.cpus, "memory": f"{node.memory_gib}Gi"} | ({"nvidia.com/gpu": node.gpus} if node.gpus else {})
    volumes: list[Manifest] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, int(node.memory_gib * SHM_SHARE))}Gi"}}
    ]
    mounts: list[Manifest] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if config.nodes.claim:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": config.nodes.claim}})
        mounts.append({"name": "storage", "mountPath": storage_path(config)})
    container: Manifest = {
        "name": name,
        "image": config.nodes.image,
        "env": _variables(config),
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": mounts,
    }
    if ports:
        container["ports"] = [{"name": key, "containerPort": port} for key, port in ports.items()]
    return {"spec": {"automountServiceAccountToken": name == "ray-head", "containers": [container], "volumes": volumes}}


def _variables(config: ClusterConfig) -> list[Manifest]:
    plain = [{"name": name, "value": value} for name, value in config.environment.items()]
    reference = config.nodes.secret
    return plain + [{"name": name, "valueFrom": {"secretKeyRef": {"name": reference, "key": name}}} for name in config.secrets]


def storage_path(config: ClusterConfig) -> str:
    """Where storage is mounted: the folder itself, or the image's working folder for a relative one."""
    return posixpath.normpath(posixpath.join("/work", config.storage))
