"""What a store is of: everything that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from cluster.config import ClusterModel

DIGEST_DIGITS = 16


class StoreKey(ClusterModel):
    """Two stores of equal keys hold the same numbers for the same rows."""

    data: str
    """Digest of the prepared rows: ids, masks and their order, held-out rows included."""
    tokenizer: str
    template: str
    """Digest of the chat template."""
    teacher: dict[str, Any]
    """What answers: digest of its weights and configuration, dtype, quantisation, or name and address."""
    vocabulary: int
    """Token ids, from 0, that answers may name."""
    request: dict[str, Any]
    """What is asked about every loss token: kind and its numbers."""
    codec: dict[str, Any]
    """Settings by which numbers become bytes."""
    codec_version: int

    @property
    def digest(self) -> str:
        """Hexadecimal digits by which the store's folder is called."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:DIGEST_DIGITS]

    def differences(self, other: StoreKey) -> list[tuple[str, object, object]]:
        """Dotted names of the fields that differ, with this key's value and the other's."""
        mine, theirs = (dict(_flat(key.model_dump(mode="json"), "")) for key in (self, other))
        names = [*mine, *(n for n in theirs if n not in mine)]
        return [(n, mine.get(n), theirs.get(n)) for n in names if mine.get(n) != theirs.get(n)]


def _flat(value: Any, path: str) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{path}.{name}" if path else name)
