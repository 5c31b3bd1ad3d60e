"""Checkpoints: what a run goes on from. Only this file saves and loads training state.

Each rank writes its part with torch.distributed.checkpoint into its own temporary folder; Ray Train merges and commits
them. `progress.json` beside the parts says where the run stood; nothing trusts a directory listing. What a rank writes it seals
(`cluster.seal`), and no rank unpickles anything before all have compared.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import seal
from cluster.storage import Folder
from orchestrator.errors import RunFailed
from orchestrator.history import smaller_is_better

if TYPE_CHECKING:
    from ray.train import Checkpoint

    from orchestrator.layouts import Layout

PROGRESS = "progress.json"
RELEASED = "released"
"""What is left in the folder of a checkpoint that was given up: Ray Train goes on only where every folder is that it knows of."""
SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class Position:
    """Where a run stood when a checkpoint was written."""

    step: int
    """Optimizer steps finished."""
    attempt: int
    metrics: Mapping[str, float]
    """Held-out metrics at this step."""
    journal: tuple[Mapping[str, Any], ...] = ()
    """The latest journal entries, so that none is lost with a driver."""
    controls: Mapping[str, Any] = field(default_factory=dict)
    """What controllers remember (`orchestrator.controls`)."""
    cursor: Mapping[str, float] = field(default_factory=dict)
    """What a curriculum has drawn (`orchestrator.draws`)."""


def name_of(attempt: int, step: int) -> str:
    """Of a checkpoint's folder; no attempt takes up another's."""
    return f"checkpoint_{attempt:03d}_{step:08d}"


def save(
    players: Mapping[str, Layout],
    position: Position,
    rank: int,
    more: Callable[[Path], None] | None = None,
    key: seal.Key | None = None,
) -> Checkpoint:
    """This rank's part of a checkpoint in a temporary folder, into which rank 0 also writes `more`, sealed with `key` if there is one.
    Collective: every rank calls it."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp  # takes a second, and the first step must not wait for it
    from ray.train import Checkpoint

    folder = tempfile.mkdtemp(prefix="distill-checkpoint-")
    dcp.save(_states(players), storage_writer=dcp.FileSystemWriter(folder, sync_files=False), no_dist=not dist.is_initialized())
    if rank == 0:
        Path(folder, PROGRESS).write_text(json.dumps(asdict(position)), encoding="utf-8")
        if more is not None:
            more(Path(folder))
    if key is not None:
        seal.seal(Path(folder), name_of(position.attempt, position.step), rank, key)
    return Checkpoint.from_directory(folder)


def restore(players: Mapping[str, Layout], checkpoint: Checkpoint, key: seal.Key | None = None) -> Position:
    """Fills the players from a committed checkpoint, at any world size, once its seal is compared where a key is given. Collective.
    `RunFailed` names the file that is not what was written."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    with checkpoint.as_directory() as folder:
        if key is not None:
            _check_together(Path(folder), Path(checkpoint.path).name, key)
        states = _states(players)
        dcp.load(states, storage_reader=dcp.FileSystemReader(folder), no_dist=not dist.is_initialized())
        for name, layout in players.items():
            layout.load(states[name])
        return read_position(Folder(str(folder)))


def _check_together(folder: Path, place: str, key: seal.Key) -> None:
    """Every rank compares its share of the files; if one finds something, none goes on."""
    import torch.distributed as dist

    from orchestrator.collective import gather, world_size

    problem = ""
    try:
        seal.check(folder, place, key, dist.get_rank() if dist.is_initialized() else 0, world_size())
    except seal.Broken as error:
        problem = f"{error}; nothing of this checkpoint is loaded"
    if gather([float(bool(problem))]).any():
        raise RunFailed(problem or f"{place} is not what was written, as another worker tells")


def read_position(folder: Folder) -> Position:
    """The position stored in a checkpoint's folder; `FileNotFoundError` when it is not a checkpoint of ours."""
    content = folder.read(PROGRESS)
    if content is None:
        raise FileNotFoundError(f"{folder.root} holds no {PROGRESS}")
    return Position(**json.loads(content))


def committed(run: Folder) -> Folder | None:
    """The newest committed checkpoint of a run as Ray Train's own snapshot names it; None before the first."""
    snapshot = _snapshot(run)
    latest = snapshot.get("latest_checkpoint_result")
    return run.child(latest["checkpoint_dir_name"]) if latest else None


def kept(run: Folder) -> list[Folder]:
    """Every committed checkpoint that is still kept, in no order."""
    results = _snapshot(run).get("checkpoint_results", [])
    return [f for r in results if not (f := run.child(r["checkpoint_dir_name"])).exists(RELEASED)]


def at(run: Folder, step: int) -> Folder | None:
    """The kept checkpoint after `step` steps, of the newest attempt that has one; None when there is none."""
    return max((f for f in kept(run) if f.root.endswith(f"_{step:08d}")), key=lambda f: f.root, default=None)


def release(found: Folder) -> None:
    """Gives a committed checkpoint up. Its run must not be going to restart from it."""
    found.write(RELEASED, b"")
    files = found.sizes()
    for part in found.names():
        if part not in files:
            found.child(part).clear()
        elif part != RELEASED:
            found.remove(part)


def best(run: Folder, metric: str) -> Folder | None:
    """The kept checkpoint with the best `metric`; the newest when it is finite in none."""
    sign = 1.0 if smaller_is_better(metric) else -1.0
    scored = [(read_position(f).metrics.get(metric), f) for f in kept(run)]
    ranked = [(sign * value, f.root, f) for value, f in scored if value is not None and math.isfinite(value)]
    return min(ranked)[2] if ranked else committed(run)


def _snapshot(run: Folder) -> dict[str, Any]:
    content = run.read(SNAPSHOT)
    return json.loads(content) if content else {}


def _states(players: Mapping[str, Layout]) -> dict[str, Any]:
    return {name: layout.state() for name, layout in players.items()}
