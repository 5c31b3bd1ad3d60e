"""What a run is called when its recipe does not say."""

from __future__ import annotations

import datetime
import re

from cluster.storage import Folder
from orchestrator.owner import small_files


def fresh_name(storage: str, recipe_name: str) -> str:
    """A name after the recipe and the time that no folder of `storage` has, nor any small files here: runs may begin in one second."""
    name = stamped(recipe_name)
    names = (name, *(f"{name}-{i}" for i in range(2, 100)))
    return next(n for n in names if _free(Folder.of(storage, n)))


def _free(home: Folder) -> bool:
    return not (home.exists() or small_files(home).exists())


def stamped(recipe_name: str) -> str:
    """A name after the recipe and the time, for who cannot look into the storage."""
    stem = re.sub(r"[^\w.+=-]+", "-", recipe_name, flags=re.ASCII).strip("-.") or "run"
    return f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
