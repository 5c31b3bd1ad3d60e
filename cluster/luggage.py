"""What a command takes along when it runs elsewhere: its YAML files, and paths that mean the same there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.package import Tree
from cluster.yaml_text import read_yaml, write_yaml

PACKED = "submitted"
"""Folder of the archive that holds what does not lie in the tree as it is."""
_OVERRIDE = re.compile(r"\w[\w.-]*=")
_GLOB = re.compile(r"[*?\[]")
_PATHS = re.compile(r"data|data\.(train|held_out)(\..+)?|(.+\.)?(student|model|local_model|tokenizer|folder)")
"""Settings that name a file or a folder, sources by name among them; of others a plain word is no path, whatever lies here."""


@dataclass
class Luggage:
    """Words of a command, made to mean on another machine what they mean here.

    A YAML file (a recipe) goes along as a copy. In it and on the command line, a relative path that is there stays what it is when the
    tree has all of it, and becomes absolute when it does not: then every node must reach it by that name.
    """

    tree: Tree
    same_machine: bool = False
    """The cluster sees the folders that are seen here: every path that is there becomes absolute."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Content by path in the archive, besides the tree's own files."""
    reached: list[str] = field(default_factory=list)
    """Absolute paths that every node must reach."""

    def arguments(self, words: Sequence[str]) -> list[str]:
        """Words of a command line: options, paths, and `dotted.path=value`."""
        return [self._argument(word) for word in words]

    def content(self, value: Any, setting: str = "") -> Any:
        """Settings as YAML holds them, those below the dotted path of one."""
        if isinstance(value, Mapping):
            return {key: self.content(inner, f"{setting}.{key}" if setting else str(key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.content(inner) for inner in value]
        return self._text(value) if isinstance(value, str) and ("/" in value or _PATHS.fullmatch(setting)) else value

    def pack(self, name: str, content: Any) -> str:
        """Takes settings along as a file; returns its path in the archive."""
        stem, taken = Path(name).stem, f"{PACKED}/{name}"
        number = 2
        while taken in self.files:
            taken, number = f"{PACKED}/{stem}-{number}.yaml", number + 1
        self.files[taken] = write_yaml(content).encode()
        return taken

    def _argument(self, word: str) -> str:
        if found := _OVERRIDE.match(word):
            setting, value = word[: found.end() - 1], word[found.end() :]
            named = "/" in value or Path(value).suffix or _PATHS.fullmatch(setting)
            return f"{setting}={self._text(value) if named else value}"
        return self._text(word)

    def _text(self, text: str) -> str:
        path = Path(text).expanduser()
        if "://" in text or not text or text.startswith("-"):
            return text
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return self.pack(f"{path.stem}.yaml", self.content(read_yaml(path)))
        there = Path(_GLOB.split(text, maxsplit=1)[0]).expanduser() if _GLOB.search(text) else path
        if not there.exists() or there == Path():
            return text
        if not self.same_machine and not path.is_absolute() and self.tree.root == Path.cwd().resolve() and self.tree.holds(there):
            return text
        absolute = str(path.absolute())
        if not self.same_machine and absolute not in self.reached:
            self.reached.append(absolute)
        return absolute
