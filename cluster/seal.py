"""A seal on the files of a checkpoint: a keyed digest of each, made by who wrote them and compared before anything in them is unpickled.

The key is the user's own and lies beside none of the files: whoever can write to the storage of runs, and has no key, cannot make a
later job load what they wrote. Whoever has a seal of an older checkpoint can bring that one back, whole, and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from cluster.settings import ClusterModel

SEAL = "seal_{:05d}.json"
SEALS = "seal_*.json"
KEY_FILE = "distill/key"
"""Below XDG_CONFIG_HOME, which is `~/.config` where it is not set."""
KEY_BYTES = 32


class SealSettings(ClusterModel):
    """Where the key is that seals checkpoints, and what becomes of those without a seal."""

    key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable of the driver that holds the key. Absent: the file `~/.config/distill/key`, mode 600, made when it is first
    needed. A driver on another machine, or in a pod that goes, needs the variable to go on with a run."""
    required: bool = True
    """Whether checkpoints without a seal are refused, such as those of releases that made none."""


class NoKey(Exception):
    """There is no key that can be used; says why."""


class Broken(Exception):
    """A checkpoint is not what was sealed; names the file."""


@dataclass(frozen=True)
class Key:
    """A key, which travels to workers and is written nowhere else."""

    secret: bytes = field(repr=False)
    required: bool = True

    @property
    def name(self) -> str:
        """What tells keys apart without telling the key."""
        return hashlib.sha256(b"distill key " + self.secret).hexdigest()[:12]

    def mac(self, content: Mapping[str, object]) -> str:
        """Keyed digest of plain content."""
        return hmac.new(self.secret, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def key_file() -> Path:
    """Where the user's own key lies."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / KEY_FILE


def key_of(settings: SealSettings) -> Key:
    """The key of whoever drives; made when it is to be a file and there is none. Raises `NoKey`."""
    if settings.key_env is not None:
        given = os.environ.get(settings.key_env, "")
        if len(given) < KEY_BYTES:
            raise NoKey(f"{settings.key_env} is {'too short' if given else 'not set'}: expected at least {KEY_BYTES} characters")
        return Key(given.encode(), settings.required)
    path = key_file()
    try:
        return Key(_read(path) if path.exists() else _made(path), settings.required)
    except OSError as error:
        raise NoKey(f"{path} cannot be read or made ({error.strerror})") from error


def _read(path: Path) -> bytes:
    about = path.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise NoKey(f"{path} is not its owner's alone: chmod 600 it, or make another")
    content = path.read_bytes().strip()
    if len(content) < KEY_BYTES:
        raise NoKey(f"{path} is too short: expected at least {KEY_BYTES} characters")
    return content


def _made(path: Path) -> bytes:
    """A new key, in place at once: another process either finds none or finds it whole."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    content = secrets.token_hex(KEY_BYTES).encode()
    with os.fdopen(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    try:
        os.link(mine, path)
    except FileExistsError:  # somebody was faster
        content = _read(path)
    finally:
        mine.unlink()
    return content


def seal(folder: Path, place: str, part: int, key: Key) -> None:
    """Seals all files of a folder as part number `part` of the checkpoint named `place`."""
    content = {"place": place, "key": key.name, "files": {name: _digest(folder / name) for name in _files(folder)}}
    (folder / SEAL.format(part)).write_text(json.dumps({**content, "mac": key.mac(content)}), encoding="utf-8")


def check(folder: Path, place: str, key: Key, part: int = 0, parts: int = 1) -> None:
    """Raises `Broken` unless every file of the checkpoint `place` in `folder` is sealed and, of the files with index % parts == part, what
    was sealed. All parts together read each file once."""
    seals = sorted(folder.glob(SEALS))
    if not seals:
        if key.required:
            raise Broken(f"{place} has no seal")
        return
    sealed: dict[str, str] = {}
    for path in seals:
        sealed |= _opened(path, place, key)
    there = list(_files(folder))
    for name in there:
        if name not in sealed:
            raise Broken(f"{place}/{name} is under no seal")
    if missing := sorted(set(sealed) - set(there)):
        raise Broken(f"{place}/{missing[0]} is gone")
    for name in there[part::parts]:
        if not hmac.compare_digest(_digest(folder / name), sealed[name]):
            raise Broken(f"{place}/{name} was changed after it was written")


def _opened(path: Path, place: str, key: Key) -> dict[str, str]:
    """Digests by name that a seal holds."""
    where = f"{place}/{path.name}"
    try:
        content = json.loads(path.read_bytes())
        mac, name, of = content.pop("mac"), content["key"], content["place"]
        files = {str(file): str(digest) for file, digest in content["files"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Broken(f"{where} is no seal") from error
    if name != key.name:
        raise Broken(f"{where} was made with another key ({name}) than this one ({key.name})")
    if not hmac.compare_digest(str(mac), key.mac(content)):
        raise Broken(f"{where} was changed after it was written")
    if of != place:
        raise Broken(f"{where} belongs to {of}")
    return files


def _files(folder: Path) -> Iterator[str]:
    """Names of all files but seals, in one order everywhere."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return iter(sorted(name for name in found if not Path(name).match(SEALS)))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
