"""What a process knows of the Ray job that it is the driver of."""

from __future__ import annotations

import json
import os

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the command of a submitted job and what that starts; not for the job's tasks and actors."""


def inside_job() -> bool:
    """Whether this process, or one above it, is the command of a submitted job."""
    return _JOB in os.environ


def submission_id() -> str | None:
    """Id of the job whose command this is; None outside of jobs."""
    if not inside_job():
        return None
    found = json.loads(os.environ[_JOB]).get("metadata", {}).get("job_submission_id")
    return None if found is None else str(found)
