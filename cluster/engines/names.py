"""How an engine says that published weights are not those of its model."""

from __future__ import annotations

from collections.abc import Iterable


def refuse_names(what: str, names: Iterable[str]) -> None:
    """`ValueError` naming up to three of `names`, which are `what`; nothing when there are none."""
    found = sorted(names)
    if found:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ValueError(f"published weights: got {len(found)} {what}: {some}; expected the names and shapes of the engine's model")
