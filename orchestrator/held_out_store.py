"""Scored held-out bundles of a run, kept as Arrow files: scored once, read by every attempt and by the control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.storage import Folder
from orchestrator.bundle import from_table, to_table

if TYPE_CHECKING:
    from strategies.core import Columns

COMPLETE = "complete"
"""Marks that every rank has stored its part."""


def store_bundles(folder: Folder, bundles: Mapping[int, Columns]) -> None:
    """Keeps this rank's scored held-out bundles by number."""
    for number, columns in bundles.items():
        sink = pa.BufferOutputStream()
        table = to_table(columns)
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        folder.write(f"{number:06d}.arrow", sink.getvalue().to_pybytes())


def load_bundles(folder: Folder, rank: int, world: int) -> list[Columns]:
    """The stored bundles that fall to this rank of `world`."""
    names = [n for n in folder.names() if n.endswith(".arrow")]
    contents = (folder.read(n) for n in names[rank::world])
    return [from_table(pa.ipc.open_file(pa.BufferReader(c)).read_all()) for c in contents if c is not None]
