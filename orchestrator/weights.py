"""A player's weights out of a checkpoint, whatever layout and world size wrote it, without a process group.

A checkpoint's metadata is a pickle: its seal is compared first, where a key is given.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cluster import seal
from cluster.storage import Folder
from orchestrator.errors import RunFailed
from orchestrator.models import FILTERS, StudentModule

NAMED = 3
"""Tensors that a message names."""


def load_weights(source: Folder, player: str, network: nn.Module, key: seal.Key | None = None) -> None:
    """Fills `network`, whole and on the CPU, in place with the weights of `player`; downloads a remote checkpoint.

    `RunFailed`, after which `network` is of no use, when the checkpoint's seal under `key` is broken, when a trained parameter or a
    buffer is missing, of another shape or unreadable, or when there are tensors that the network does not have. Frozen parameters keep
    what they hold.
    """
    with Checkpoint(source.root).as_directory() as folder:
        if key is not None:
            _check_seal(Path(folder), source, key)
        reader = dcp.FileSystemReader(folder)
        saved = _saved(reader, source, player)
        own = StudentModule(network).state_dict(keep_vars=True)
        where = f"checkpoint {source.root}, player {player!r}"
        _check_names(where, saved, own)
        targets = {f"{player}.model.{name}": _target(where, name, own[name], size) for name, size in saved.items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant
                dcp.load(targets, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            reasons = "; ".join(f"{type(e).__name__}: {str(e)[:200]}" for e, _ in error.failures.values())
            raise RunFailed(f"{where}: its files cannot be read ({reasons}). Use another checkpoint.") from None


def _check_seal(folder: Path, source: Folder, key: seal.Key) -> None:
    try:
        seal.check(folder, source.root.rstrip("/").rpartition("/")[2], key)
    except seal.Broken as error:
        raise RunFailed(f"checkpoint {source.root}: {error}; nothing of it is loaded.") from error


def _saved(reader: dcp.FileSystemReader, source: Folder, player: str) -> dict[str, torch.Size]:
    """Shapes of the player's saved tensors by name in its `StudentModule`, without what was only trained beside it."""
    try:
        entries = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise RunFailed(f"checkpoint {source.root}: its .metadata cannot be read ({error}). Use another one.") from error
    prefix = f"{player}.model."
    saved = {n.removeprefix(prefix): e.size for n, e in entries.items() if n.startswith(prefix) and isinstance(e, TensorStorageMetadata)}
    found = {name: size for name, size in saved.items() if not name.startswith(f"{FILTERS}.")}
    if not found:
        players = sorted({name.partition(".")[0] for name in entries})
        raise RunFailed(f"checkpoint {source.root}: got the players {', '.join(players)}; expected {player!r} among them.")
    return found


def _check_names(where: str, saved: Mapping[str, torch.Size], own: Mapping[str, Tensor]) -> None:
    """Every trained parameter is saved under at least one of its names (a tied head has two), and nothing is left over."""
    filled = {id(own[name]) for name in saved if name in own}
    frozen = {name for name, value in own.items() if isinstance(value, nn.Parameter) and not value.requires_grad}
    missing = [name for name, value in own.items() if id(value) not in filled and name not in frozen]
    unexpected = [name for name in saved if name not in own]
    problems = [f"{what} {_some(names)}" for what, names in (("it lacks", missing), ("it also has", unexpected)) if names]
    if problems:
        raise RunFailed(f"{where}: {' and '.join(problems)}. Expected the tensors of the recipe's student; was the recipe changed?")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(name.removeprefix("model.") for name in names[:NAMED]) + more


def _target(where: str, name: str, own: Tensor, size: torch.Size) -> Tensor:
    """The memory to read into, in the saved shape: ZeRO saves flat tensors."""
    if own.shape == size:
        return own.detach()
    if len(size) == 1 and own.numel() == size[0]:
        return own.detach().view(-1)
    raise RunFailed(f"{where}: got {name.removeprefix('model.')} of shape {tuple(size)}; expected {tuple(own.shape)} as in the recipe.")
