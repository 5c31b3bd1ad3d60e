"""The folders of a search and of its trials: that nobody has them when it begins, and only itself when it goes on."""

from __future__ import annotations

from cluster.storage import Folder
from orchestrator.checks import owners, recipe
from orchestrator.config import Job
from orchestrator.errors import Refusal
from orchestrator.naming import fresh_name
from orchestrator.owner import small_files
from orchestrator.search.book import run_names


def new_name(job: Job, stem: str) -> str:
    """The name of a search that begins. Its trials' folders are as free as its own: a trial goes on with whatever lies there."""
    name = job.run.name or fresh_name(job.cluster.storage, stem)
    recipe.check_name(name)
    folder = Folder.of(job.cluster.storage, name)
    if folder.exists():
        do = f"To go on with it: distill search --resume {folder.root}. Otherwise choose another name."
        raise Refusal("name", f"{folder.root}, which is there", "a folder that does not exist", do)
    for trial in run_names(name, Folder.of(job.cluster.storage).names()):
        do = "Choose another name, or move or remove the folders of those trials."
        got = f"{Folder.of(job.cluster.storage, trial).root}, a trial of an earlier search of that name"
        raise Refusal("name", got, "a name that no search had", do)
    owners.check_no_small_files([folder, *_trials_here(folder)])
    return name


def check_goes_on(home: Folder) -> None:
    """Nobody drives the search, and what lies here of it and its trials, if anything, is its own."""
    owners.check_nobody_drives(f"resume {home.root}", home, "search", owners.GRACE_SECONDS)
    owners.check_own_small_files([home, *_trials_here(home)])


def _trials_here(home: Folder) -> list[Folder]:
    """Runs of a search's trials that have small files here."""
    here = small_files(home)
    names = [path.name for path in here.parent.iterdir()] if here.parent.is_dir() else []
    storage, _, search = home.root.rpartition("/")
    return [Folder.of(storage, name) for name in sorted(run_names(search, names))]
