"""The folder of a run: its name, and that nobody has it."""

from __future__ import annotations

from cluster.storage import Folder
from orchestrator.checks import machine, owners, recipe, resumed
from orchestrator.config import Job
from orchestrator.naming import fresh_name
from orchestrator.result import RESULT

BASELINE = "-baseline"
"""Follows a run's name in that of its control."""


def run_folder(job: Job, recipe_name: str, resume: Folder | None) -> Folder:
    """The run's folder: a new one that nobody has, or the earlier run's."""
    machine.check_storage(job.cluster.storage)
    if resume is not None:
        resumed.check_resumable(resume, job, RESULT)
        owners.check_own_small_files(_with_control(resume, job))
        return resume
    name = job.run.name or fresh_name(job.cluster.storage, recipe_name)
    recipe.check_name(name)
    folder = Folder.of(job.cluster.storage, name)
    machine.check_folders_free(_with_control(folder, job), RESULT)
    owners.check_no_small_files(_with_control(folder, job))
    return folder


def _with_control(folder: Folder, job: Job) -> list[Folder]:
    return [folder, Folder(folder.root + BASELINE)] if job.run.baseline else [folder]
