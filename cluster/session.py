"""The one place that starts or joins Ray."""

from __future__ import annotations

import logging
import os

import ray

from cluster.config import ClusterConfig
from cluster.resources import Share

NAMESPACE = "distill"
NO_ROOM_SECONDS = 15


def start(config: ClusterConfig, verbose: bool = False) -> bool:
    """Starts Ray here or joins the cluster that `config` names; False when this process already has.

    Ray's own chatter is off unless `verbose`. The dashboard stays on: Train V2 and Tune ask its State API.
    """
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.patience.worker_seconds)  # Ray Train hands it on
    if ray.is_initialized():
        return False
    quiet = {} if verbose else {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    os.environ.update({k: v for k, v in quiet.items() if k not in os.environ})
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # every report waits for this poll
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = None if config.ray_address == "local" else config.ray_address
    local = {"dashboard_host": "127.0.0.1"} if address is None else {}
    ray.init(
        address=address or "local",
        namespace=NAMESPACE,
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
        configure_logging=True,
        **local,
    )
    return True


def try_fewer_soon() -> None:
    """For worker groups that may be smaller: Ray Train counts a lost node's room for some seconds more, and then waits for workers that
    cannot start. Call it before a trainer is made."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(NO_ROOM_SECONDS))


def nodes() -> dict[str, str]:
    """Addresses of the living nodes of the cluster this process has joined, by id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def room() -> Share:
    """Logical CPUs and GPUs of the cluster this process has joined, as it is now."""
    there = ray.cluster_resources()
    return Share(float(there.get("CPU", 0.0)), float(there.get("GPU", 0.0)), 0)


def address() -> str:
    """Address by which other processes of this machine reach the same Ray."""
    return str(ray.get_runtime_context().gcs_address)


def stop() -> None:
    """Leaves Ray; ends it if `start` started it."""
    ray.shutdown()
