"""YAML files: the only place of this package that reads or writes them."""

from __future__ import annotations

from pathlib import Path

import yaml


def read_yaml(path: Path) -> object:
    """Parsed content of a YAML file; `yaml.YAMLError` or `OSError` when it cannot be read."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def write_yaml(*documents: object) -> str:
    """YAML text of plain content, in the order of its keys; several documents are separated by `---`."""
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120)
