"""The stores there are, of signals and of text: listed, verified byte by byte, removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.storage import Folder
from cluster.stores.files import SPEC, StoreFiles
from cluster.stores.lease import LEASE, holder_alive
from cluster.stores.parts import StoreDamaged
from orchestrator.errors import Refusal

KINDS = ("signals", "text")
"""Folders below the storage folder that hold stores."""


@dataclass(frozen=True)
class Listed:
    """One store as a person looks at it."""

    folder: Folder
    state: str
    """`finished`, how many parts are there, or what is damaged."""
    asked: str
    """The question and the codec."""
    rows: int
    loss_tokens: int
    size: int
    """Bytes of all its files."""


def listed(config: ClusterConfig, names: Sequence[str] = ()) -> list[Listed]:
    """The stores below the storage folder, or those that are named by folder. `Refusal` for a name that is none."""
    homes = [Folder.of(config.storage, kind) for kind in KINDS]
    there = [home.child(n) for home in homes for n in home.names() if home.child(n).exists(SPEC)]
    if not names:
        return [_look(folder) for folder in there]
    known = {folder.root.rpartition("/")[2]: folder for folder in there}
    folders = [Folder.of(n) if Folder.of(n).exists(SPEC) else known.get(n) for n in names]
    for name, folder in zip(names, folders, strict=True):
        if folder is None:
            raise Refusal("stores", f"{name!r}, which is no store", "the folder of one", "`distill stores` lists them.")
    return [_look(folder) for folder in folders if folder is not None]


def _look(folder: Folder) -> Listed:
    files, size = StoreFiles(folder), sum(folder.sizes().values())
    try:
        spec = files.spec
        parts = files.parts if files.finished else files.complete_parts()
        state = "finished" if files.finished else f"{len(parts)} of {spec.parts} parts"
    except StoreDamaged as error:
        return Listed(folder, f"damaged: {error}", "", 0, 0, size)
    request = " ".join(f"{k}={v}" for k, v in spec.key.request.items() if v and k != "kind")
    asked = f"{spec.key.request.get('kind')} {request}, {spec.key.codec.get('type')}".replace(" ,", ",")
    return Listed(folder, state, asked, spec.rows, sum(p.loss_tokens for p in parts), size)


def verify(store: Listed) -> list[str]:
    """What is wrong with a store, a sentence each: every part that is there is read whole."""
    files = StoreFiles(store.folder)
    try:
        infos = files.parts if files.finished else tuple(files.complete_parts())
    except StoreDamaged as error:
        return [str(error)]
    problems = []
    for info in infos:
        try:
            files.content(info)
        except StoreDamaged as error:
            problems.append(str(error))
    return problems


def prune(store: Listed) -> None:
    """Removes a store. `Refusal` while a process fills it."""
    if store.folder.exists(LEASE) and holder_alive(store.folder):
        raise Refusal(f"signal store {store.folder.root}", "a process that fills it", "nobody using it", "Wait for it, or stop it.")
    store.folder.clear()
