"""The files of one store: what it is of, which parts it has, and how they are read from any filesystem."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from cluster.storage import Folder
from cluster.stores.key import StoreKey
from cluster.stores.parts import Part, StoreDamaged, content_checksum

FORMAT = 1
"""Raised when older programs could not read what is written."""
SPEC, MANIFEST = "store.json", "manifest.json"


@dataclass(frozen=True)
class PartInfo:
    """A complete part."""

    number: int
    rows: int
    loss_tokens: int
    tokens: int
    """Tokens of its rows, those that are not learnt included."""
    bytes: int
    checksum: str
    dropped_mass: float
    """Largest share of a token's probability that lay on ids which the student lacks."""
    seconds: float
    """What the teacher took."""
    cost: float = 0.0

    @property
    def file(self) -> str:
        return part_file(self.number)


def part_file(number: int) -> str:
    return f"part-{number:06d}.arrow"


def _info_file(number: int) -> str:
    return f"part-{number:06d}.json"


@dataclass(frozen=True)
class Spec:
    """What a store is of. Its rows are numbered through; part n holds those from `starts[n]` to `starts[n + 1]`."""

    key: StoreKey
    name: str
    """Of the endpoint that answered."""
    starts: tuple[int, ...]

    @property
    def parts(self) -> int:
        return len(self.starts) - 1

    @property
    def rows(self) -> int:
        return self.starts[-1]

    def to_json(self) -> bytes:
        content = {"format": FORMAT, "name": self.name, "key": self.key.model_dump(mode="json"), "starts": self.starts}
        return json.dumps(content, indent=1).encode()


@dataclass(frozen=True)
class StoreFiles:
    """One store. Parts elsewhere than on this machine are fetched into `cache` when first read."""

    folder: Folder
    cache: Path | None = None

    @cached_property
    def spec(self) -> Spec:
        """`StoreDamaged` for a folder without a readable `store.json`, or of a newer program's making."""
        content = self._json(SPEC)
        try:
            return Spec(StoreKey.model_validate(content["key"]), str(content["name"]), tuple(int(s) for s in content["starts"]))
        except (KeyError, TypeError, ValidationError) as error:
            raise StoreDamaged(f"{self.folder.root}/{SPEC}: does not say what the store is of ({type(error).__name__})") from error

    def begin(self, spec: Spec) -> None:
        """Makes the folder, unless it is there."""
        if not self.folder.exists(SPEC):
            self.folder.write(SPEC, spec.to_json())

    @property
    def finished(self) -> bool:
        return self.folder.exists(MANIFEST)

    def keep(self, info: PartInfo, content: pa.Buffer) -> None:
        """Writes a part, then that it is there."""
        self.folder.write(info.file, content)
        self.folder.write(_info_file(info.number), json.dumps(asdict(info)).encode())

    def complete_parts(self) -> list[PartInfo]:
        """Parts of a store being filled that are there whole, by number."""
        names = set(self.folder.names())
        numbers = [n for n in range(self.spec.parts) if {part_file(n), _info_file(n)} <= names]
        infos = [self._info(self._json(_info_file(n))) for n in numbers]
        sizes = self.folder.sizes()
        return [i for i in infos if sizes.get(i.file) == i.bytes]

    def finish(self, parts: Sequence[PartInfo], facts: dict[str, Any]) -> None:
        """Writes the manifest, which makes the store readable, and drops what it replaces."""
        content = {"format": FORMAT, "parts": [asdict(p) for p in parts], **facts}
        self.folder.write(MANIFEST, json.dumps(content, indent=1).encode())
        for part in parts:
            self.folder.remove(_info_file(part.number))

    @cached_property
    def parts(self) -> tuple[PartInfo, ...]:
        """Of a finished store. `StoreDamaged` when its manifest does not say."""
        content = self._json(MANIFEST)
        found = tuple(self._info(p) for p in content.get("parts", ()))
        if [p.number for p in found] != list(range(self.spec.parts)) or sum(p.rows for p in found) != self.spec.rows:
            raise StoreDamaged(f"{self.folder.root}/{MANIFEST}: lists {len(found)} parts where {SPEC} has {self.spec.parts}")
        return found

    def check(self) -> None:
        """Every part of a finished store is there in its size. `StoreDamaged` names the first that is not."""
        sizes = self.folder.sizes()
        for part in self.parts:
            if part.file not in sizes:
                raise StoreDamaged(f"{self.folder.root}/{part.file}: is missing")
            if sizes[part.file] != part.bytes:
                raise StoreDamaged(f"{self.folder.root}/{part.file}: has {sizes[part.file]:,} bytes, not {part.bytes:,}")

    @property
    def bytes_per_token(self) -> float:
        """Size of a finished store's parts over its loss tokens."""
        return sum(p.bytes for p in self.parts) / max(1, sum(p.loss_tokens for p in self.parts))

    @property
    def manifest_text(self) -> str:
        """What a finished store is of and what it holds, as JSON."""
        return json.dumps({**self._json(SPEC), **self._json(MANIFEST)}, indent=1)

    def open(self, info: PartInfo) -> Part:
        """A part. `StoreDamaged` when its bytes are not those that were written."""
        return Part(f"{self.folder.root}/{info.file}", self.content(info))

    def content(self, info: PartInfo) -> pa.Buffer:
        """The file of a part. `StoreDamaged` when its bytes are not those that were written."""
        content = self._content(info)
        if content_checksum(content) != info.checksum:
            raise StoreDamaged(f"{self.folder.root}/{info.file}: its bytes are not those that were written")
        return content

    def _content(self, info: PartInfo) -> pa.Buffer:
        home = self.folder.local or self._fetched(info)
        try:
            return pa.memory_map(str(home / info.file)).read_buffer()
        except OSError as error:
            raise StoreDamaged(f"{self.folder.root}/{info.file}: cannot be read ({error.strerror or error})") from error

    def _fetched(self, info: PartInfo) -> Path:
        if self.cache is None:
            raise ValueError(f"{self.folder.root}: parts elsewhere than on this machine need a cache folder")
        home = Folder(str(self.cache / self.spec.key.digest))
        if home.sizes().get(info.file) != info.bytes:
            content = self.folder.read(info.file)
            if content is None:
                raise StoreDamaged(f"{self.folder.root}/{info.file}: is missing")
            home.write(info.file, content)
        return Path(home.root)

    def _json(self, name: str) -> dict[str, Any]:
        where, content = f"{self.folder.root}/{name}", self.folder.read(name)
        if content is None:
            raise StoreDamaged(f"{where}: is missing")
        try:
            found = json.loads(content)
        except ValueError as error:
            raise StoreDamaged(f"{where}: is not JSON") from error
        if not isinstance(found, dict):
            raise StoreDamaged(f"{where}: is not a JSON object")
        if int(found.get("format", FORMAT)) > FORMAT:
            raise StoreDamaged(f"{where}: was written by a newer program (format {found['format']}; this one reads up to {FORMAT})")
        return found

    def _info(self, content: dict[str, Any]) -> PartInfo:
        try:
            return PartInfo(**content)
        except TypeError as error:
            raise StoreDamaged(f"{self.folder.root}: does not say what a part is ({error})") from error


def vocabulary_of(folders: Sequence[str]) -> int:
    """Ids that the stores' answers may name: the fewest of any."""
    return min(StoreFiles(Folder.of(root)).spec.key.vocabulary for root in folders)
