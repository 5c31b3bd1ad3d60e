"""What every test shares: an environment without network or accelerator surprises, and one lazily started Ray."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read by the libraries when they are imported, so set before any test module is.
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"})
# A tracking server or run of the person who starts the tests must not receive what they log.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)
# Nor does a key that seals checkpoints belong among theirs.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="distill-config-")
atexit.register(shutil.rmtree, os.environ["XDG_CONFIG_HOME"], ignore_errors=True)

HERE = Path(__file__).parent
PURE = HERE / "strategies"
LEFT_OPEN = "ignore::pytest.PytestUnraisableExceptionWarning"
"""What other tests of the process left open, of which the collector tells whoever runs when it comes by."""
RAY_FIXTURE = "ray_session"
RAY_CPUS = 4
"""Logical, so that two workers, a scorer and a reader fit on two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors in the pure tier; whoever starts Ray is marked `cluster`; `gpu` skips without one."""
    for item in items:
        if item.path.is_relative_to(PURE):
            item.add_marker(pytest.mark.filterwarnings("error", LEFT_OPEN))
        if RAY_FIXTURE in getattr(item, "fixturenames", ()):
            item.add_marker("cluster")
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not _has_gpu(), reason="needs an accelerator that torch can see"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """Address of one local Ray that all tests of the session share; nothing starts until a test asks for it.

    The dashboard stays on because Train and Tune ask its State API, and RAY_ADDRESS names this instance to whatever
    the tests start: a second instance on the machine confuses Train's clean-up.
    """
    import ray

    before = os.environ.pop("RAY_ADDRESS", None)
    context = ray.init(
        address="local", num_cpus=RAY_CPUS, include_dashboard=True, dashboard_host="127.0.0.1", namespace="distill", log_to_driver=False
    )
    os.environ["RAY_ADDRESS"] = context.address_info["address"]
    yield os.environ["RAY_ADDRESS"]
    ray.shutdown()
    if before is None:
        os.environ.pop("RAY_ADDRESS", None)
    else:
        os.environ["RAY_ADDRESS"] = before
