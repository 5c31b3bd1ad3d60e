"""Whose a run's small files are, and who drives a run: both are written down where another driver looks before it begins.

A run whose folder is in remote storage has its small files in a folder here that has its name alone, and another storage may have a run
of that name: beside the files lies which run's they are. In their copy, in the run's folder, lies who drives it now.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import Folder
from orchestrator.journal import Heartbeat

COPY = "driver"
"""Folder of the copy, in the run's."""
OWNER = "owner"
"""Name of the file, in the copy and beside the files here. A run whose folder is on this machine has none."""

_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")


@dataclass(frozen=True)
class Owner:
    """What `OWNER` says."""

    id: str
    """Of one time of driving. Where it is the same here and in the copy, the copy is of the files here."""
    home: str = ""
    """The run's folder, without a password. Only beside the files here."""
    beat: Heartbeat | None = None
    """The last sign of life of who drives. Only in the copy, and only until that ends."""

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def of(cls, content: bytes | None) -> Owner | None:
        """None for no content. Of what cannot be read nothing is known but that it is somebody's."""
        if content is None:
            return None
        try:
            found = json.loads(content)
            return cls(found["id"], found["home"], Heartbeat(**found["beat"]) if found["beat"] else None)
        except (ValueError, TypeError, KeyError):
            return cls("")

    @classmethod
    def here(cls, folder: Path) -> Owner | None:
        """Of the small files in a folder of this machine; None where no remote run has left any."""
        path = folder / OWNER
        return cls.of(path.read_bytes()) if path.is_file() else None

    @classmethod
    def of_copy(cls, home: Folder) -> Owner | None:
        """Of the copy in a run's folder."""
        return cls.of(home.child(COPY).read(OWNER))

    def same(self, other: Owner | None) -> bool:
        """Whether both were written by one driver."""
        return bool(self.id) and other is not None and self.id == other.id


def small_files(home: Folder) -> Path:
    """Where the small files of a run lie on this machine: in its folder, or in `runs` here where that is remote."""
    return home.local or Path("runs") / home.root.rpartition("/")[2]


def public_root(root: str) -> str:
    """A folder's address, to be written down."""
    return _PASSWORD.sub("", root)


def driver_of(home: Folder) -> Heartbeat | None:
    """The last sign of life of a run's driver; None where its driver ended by itself, or none ever began."""
    if home.local is not None:
        return Heartbeat.load(home.local)
    owner = Owner.of_copy(home)
    return owner.beat if owner else None


def are_of(home: Folder) -> bool:
    """Whether the small files here that have a remote run's name are its own, or there are none."""
    folder = small_files(home)
    mine = Owner.here(folder)
    if mine is None:
        return not folder.exists()
    return mine.home == public_root(home.root) or mine.same(Owner.of_copy(home))


def home_of(folder: Folder, storage: str) -> Folder:
    """The run's own folder, where `folder` may be that of its small files here. `storage`, as the settings have it, may know a password."""
    mine = None if folder.local is None else Owner.here(folder.local)
    if folder.local is None or mine is None:
        return folder
    configured = Folder.of(storage, folder.local.name)
    return Folder(mine.home) if mine.home and mine.home != public_root(configured.root) else configured
