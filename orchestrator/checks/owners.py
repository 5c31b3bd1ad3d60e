"""Who else may have a run: another driver, or the small files of another run of its name on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

from cluster.storage import Folder
from orchestrator.errors import Refusal
from orchestrator.owner import Owner, are_of, driver_of, public_root, small_files

SILENCE_SECONDS = 30.0
"""After which a driver on another machine is taken for gone; it writes every few seconds."""
FAR_SILENCE_SECONDS = 90.0
"""The same where it writes into remote storage, which takes a moment and may fail for a while."""
GRACE_SECONDS = 30.0
"""More of the same for a search: the drivers of its trials, which go on with it, may have written that much later than its own."""


def check_nobody_drives(where: str, home: Folder, what: str = "run", grace_seconds: float = 0.0) -> None:
    """Two drivers would tear each other's journal and checkpoints apart. One that failed in this very process is gone."""
    beat, silence = driver_of(home), (FAR_SILENCE_SECONDS if home.local is None else SILENCE_SECONDS) + grace_seconds
    if beat is None or not beat.alive(silence) or (beat.host, beat.pid) == (socket.gethostname(), os.getpid()):
        return
    do = "Wait for its end, or stop it: Ctrl-C there, or `distill jobs stop` for a job."
    gone = "" if beat.host == socket.gethostname() else f" If it was killed, it counts as gone after {silence:g} seconds of silence."
    raise Refusal(where, f"a {what} that process {beat.pid} of {beat.host} is driving", "one that nobody drives", do + gone)


def check_no_small_files(homes: Iterable[Folder]) -> None:
    """No files that a new remote run would take for its own: of one whose folder was removed, or that lies in another storage."""
    for home in homes:
        here = small_files(home)
        if home.local is None and here.exists():
            do = "Choose another name, or move or remove that folder. To go on with that run: --resume and its folder."
            raise Refusal("name", f"{here}, where small files of {_whose(here)} lie", "a name that no run has here", do)


def check_own_small_files(homes: Iterable[Folder]) -> None:
    """What lies here of remote runs that go on, if anything, is their own."""
    for home in homes:
        here = small_files(home)
        if home.local is None and not are_of(home):
            got = f"{here}, where small files of {_whose(here)} lie"
            do = "Move that folder, or start in another working folder; what belongs to this run is brought from its own."
            raise Refusal(f"resume {public_root(home.root)}", got, "those of this run, or none", do)


def _whose(here: Path) -> str:
    owner = Owner.here(here)
    return owner.home if owner and owner.home else "another run"
