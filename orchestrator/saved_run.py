"""The job of an earlier run, from its folder, wherever that lies."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.storage import Folder
from orchestrator.config import Job, load_job
from orchestrator.errors import Refusal
from orchestrator.result import RECIPE


def saved_job(home: Folder, overrides: Sequence[str] = (), cluster: Path | Mapping[str, Any] | None = None) -> Job:
    """Arguments as for `load_job`. `Refusal` for a folder without a recipe, and for an address that cannot be read."""
    where = f"run folder {home.root!r}"
    try:
        content = home.read(RECIPE)
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:200]
        raise Refusal(where, problem, "a folder, or a URI such as s3://bucket/runs/name", "Check the address.") from error
    if content is None:
        raise Refusal(where, f"no {RECIPE}", "the folder of a run", "Look in the storage folder, runs/ by default.")
    if home.local is not None:
        return load_job(home.local / RECIPE, overrides, cluster)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RECIPE
        path.write_bytes(content)
        return load_job(path, overrides, cluster)
