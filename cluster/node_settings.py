"""Settings of the machines of a cluster that does not run yet: what `distill cluster render` writes files from."""

from __future__ import annotations

from typing import Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

from cluster.settings import ClusterModel


class Node(ClusterModel):
    """One machine or pod."""

    cpus: PositiveInt = 4
    memory_gib: PositiveInt = 16
    gpus: NonNegativeInt = 0
    machine: dict[str, JsonValue] = Field(default_factory=dict)
    """For the cluster launcher: the provider's own `node_config`, such as `{InstanceType: m5.xlarge}`."""


class NodeGroup(Node):
    """Machines of one kind that may come and go."""

    min: NonNegativeInt = 1
    max: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"at most `max` ({self.max}) nodes as `min`, got {self.min}")
        return self


class Nodes(ClusterModel):
    """The cluster that is rendered: KubeRay manifests, a cluster-launcher file, a Dockerfile."""

    name: str = Field(default="distill", pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")
    image: str = "distill:latest"
    """Image of all nodes: what the rendered Dockerfile builds, pushed to where the nodes pull from."""
    head: Node = Node(cpus=2, memory_gib=8)
    """Runs the driver of each job, and no workers."""
    groups: dict[str, NodeGroup] = Field(default_factory=lambda: {"workers": NodeGroup()})
    """Worker nodes by name."""
    claim: str | None = None
    """Kubernetes: name of a PersistentVolumeClaim (ReadWriteMany) mounted at `storage` on every pod. Needed when storage is a folder."""
    secret: str = "distill-secrets"
    """Kubernetes: name of the Secret whose keys are the variables listed in `secrets`."""
    provider: dict[str, JsonValue] = Field(default={"type": "aws", "region": "us-west-2"})
    """Cluster launcher: `provider` as Ray documents it."""
    ssh_user: str = "ubuntu"
