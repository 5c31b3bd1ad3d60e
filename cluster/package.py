"""The working tree as one archive for a job: what goes in, how large it is, and what makes it too large."""

from __future__ import annotations

import logging
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files

NEVER = (".env", ".netrc", ".mypy_cache", ".ruff_cache", ".pytest_cache", "node_modules")
"""Patterns that stay here whatever the ignore files say: files that hold secrets by custom, and caches."""
CULPRITS = 5
"""Entries that are named when a tree is too large."""
DOMINATES = 0.8
"""An entry that holds this share of its folder's bytes is named instead of the folder."""

Ignores = list[Callable[[Path], bool]]

_silent = logging.getLogger("cluster.package.ray")
_silent.setLevel(logging.ERROR)


@dataclass(frozen=True)
class Tree:
    """The files of a folder that a job takes along."""

    root: Path
    files: Mapping[str, int]
    """Bytes by path below `root`, with slashes."""

    @classmethod
    def of(cls, root: Path, without: Path | None = None) -> Tree:
        """What `.gitignore` and `.rayignore` leave, in every folder, by the rules that Ray itself applies to a working_dir. Links that
        lead out of the tree are left out, and so is the folder `without`."""
        root = root.resolve()
        ignores: Ignores = [_get_excludes(root, [*get_runtime_env_default_excludes(), *NEVER])]
        ignores += [] if without is None else [without.resolve().__eq__]
        return cls(root, {path.relative_to(root).as_posix(): path.stat().st_size for path in _walk(root, root, ignores)})

    @property
    def size(self) -> int:
        """Bytes of all files, uncompressed."""
        return sum(self.files.values())

    def holds(self, path: Path) -> bool:
        """Whether a file, or every file of a folder, goes along."""
        path = path.resolve()
        if not path.is_relative_to(self.root):
            return False
        inner = path.rglob("*") if path.is_dir() else iter([path])
        found = [p.relative_to(self.root).as_posix() in self.files for p in inner if p.is_file()]
        return bool(found) and all(found)

    def culprits(self) -> list[tuple[str, int]]:
        """The entries that weigh most, as narrow as they explain their folder, with their bytes; largest first."""
        narrowed = [_narrowed(name, self.files) for name in _children("", self.files)]
        return sorted(narrowed, key=lambda entry: -entry[1])[:CULPRITS]

    def write(self, archive: Path, extra: Mapping[str, bytes]) -> None:
        """A zip of the files and of `extra` content by path. Equal contents make equal archives, so that Ray uploads them once."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
            for name in sorted(self.files):
                path = self.root / name
                _add(out, name, path.read_bytes(), executable=bool(path.stat().st_mode & stat.S_IXUSR))
            for name, content in sorted(extra.items()):
                _add(out, name, content, executable=False)


def _walk(folder: Path, root: Path, ignores: Ignores) -> Iterator[Path]:
    inner = [*ignores, *get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_silent)]
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if any(ignored(path) for ignored in inner) or not path.resolve().is_relative_to(root):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, root, inner)
        elif path.is_file():
            yield path


def _add(out: zipfile.ZipFile, name: str, content: bytes, executable: bool) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980, whenever it was written
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (0o755 if executable else 0o644) << 16
    out.writestr(info, content)


def _children(folder: str, files: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the entries of a folder; names of folders end in a slash."""
    sizes: dict[str, int] = {}
    for name, size in files.items():
        if name.startswith(folder):
            first, slash, _ = name[len(folder) :].partition("/")
            sizes[folder + first + slash] = sizes.get(folder + first + slash, 0) + size
    return sizes


def _narrowed(name: str, files: Mapping[str, int]) -> tuple[str, int]:
    total = sum(size for file, size in files.items() if file.startswith(name))
    while name.endswith("/"):
        inner, size = max(_children(name, files).items(), key=lambda entry: entry[1])
        if size < DOMINATES * total:
            break
        name, total = inner, size
    return name, total
