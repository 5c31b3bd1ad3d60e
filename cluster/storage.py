"""Small files of a run on whatever filesystem holds it: a local folder or any URI that pyarrow knows."""

from __future__ import annotations

import os
import posixpath
import socket
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import fsspec
import pyarrow as pa
from pyarrow import fs

RENAMING = ("file", "hdfs", "viewfs")
"""Schemes where a file is seen as it grows and can be renamed over another. An object store shows a file once all of it is there, and the
moves of what fsspec knows do not always replace."""


@dataclass(frozen=True)
class Folder:
    """One folder on a pyarrow filesystem. `root` is an absolute local path or a URI; safe to pickle."""

    root: str

    @classmethod
    def of(cls, storage: str, *parts: str) -> Folder:
        """Folder `parts` below a storage setting; relative local paths are taken from here."""
        root = storage.rstrip("/") if "://" in storage else str(Path(storage).absolute())
        return cls(posixpath.join(root, *parts))

    def child(self, *parts: str) -> Folder:
        return Folder(posixpath.join(self.root, *parts))

    @property
    def local(self) -> Path | None:
        """The folder as a local path; None when it lives elsewhere."""
        return None if "://" in self.root else Path(self.root)

    def exists(self, name: str = "") -> bool:
        filesystem, path = self._at(name)
        return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)

    def read(self, name: str) -> bytes | None:
        """Content of a file; None when there is none."""
        if not self.exists(name):
            return None
        filesystem, path = self._at(name)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Writes a file whole: a reader sees the old content or the new one, never a part; some of fsspec's promise less."""
        filesystem, path = self._at(name)
        filesystem.create_dir(posixpath.dirname(path), recursive=True)
        part = f"{path}.{socket.gethostname()}-{os.getpid()}.part"  # drivers of several machines may write here
        target = part if self.local or self.root.partition("://")[0] in RENAMING else path
        with filesystem.open_output_stream(target) as stream:
            stream.write(content)
        if target != path:
            filesystem.move(target, path)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file that is not there; False when it is. Exact on a local disk; elsewhere two may both succeed at once."""
        if self.local is None:
            if self.exists(name):
                return False
            self.write(name, content)
            return True
        mine = f".{uuid.uuid4().hex}.part"
        self.write(mine, content)
        try:
            os.link(self.local / mine, self.local / name)
        except FileExistsError:
            return False
        finally:
            self.remove(mine)
        return True

    def take(self, folder: Path) -> None:
        """Copies a local folder here, with all that is in it."""
        filesystem, path = self._at("")
        fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)

    def names(self) -> list[str]:
        """Base names of what lies in the folder, sorted."""
        filesystem, path = self._at("")
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that lie in the folder, by base name."""
        filesystem, path = self._at("")
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return {info.base_name: int(info.size) for info in found if info.type == fs.FileType.File}

    def remove(self, name: str) -> None:
        """Removes a file; none is fine."""
        filesystem, path = self._at(name)
        if filesystem.get_file_info(path).type != fs.FileType.NotFound:
            filesystem.delete_file(path)

    def clear(self) -> None:
        """Removes the folder with all that is in it."""
        filesystem, path = self._at("")
        filesystem.delete_dir(path)

    def _at(self, name: str) -> tuple[fs.FileSystem, str]:
        full = posixpath.join(self.root, name) if name else self.root
        if "://" not in full:
            return fs.LocalFileSystem(), full
        scheme, _, rest = full.partition("://")
        host, _, below = rest.partition("/")
        filesystem, beginning = _remote(f"{scheme}://{host}")
        return filesystem, posixpath.join(beginning or "/", below) if below else beginning or "/"


@lru_cache(maxsize=16)
def _remote(address: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a scheme and host or bucket, with the path it begins at: pyarrow's own, or any that fsspec knows."""
    if address == "file://":  # pyarrow knows none without a path, and fsspec takes it for the working folder
        return fs.LocalFileSystem(), "/"
    try:
        filesystem, path = fs.FileSystem.from_uri(address)
    except pa.ArrowInvalid:  # a scheme that pyarrow does not know
        found, path = fsspec.core.url_to_fs(address)
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(found))
    return filesystem, path
