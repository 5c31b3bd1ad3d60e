"""Student versions: who may write with which, where a writer finds it, and how a training worker sends one out.

A version is (attempt, finished optimizer steps). Rank 0 puts the gathered weights into Ray's object store and tells the board; the
reader holds a step's rows back until the version that they are to be written with is there; a writer's process takes exactly that
one, once. So neither blocks in flight, nor prefetching, nor the number of workers or writers can make a row older than it may be.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from cluster.engines import Follower
from orchestrator.bundle import HELD_OUT_STEP, scalar

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.engines import Engine
    from orchestrator.layouts import Layout
    from strategies.core import Columns

VERSION = "policy_version"
"""Control column: the version that a bundle was written with."""
REPEAT_SECONDS = 5.0
NO_CONTROLS: Mapping[int, Mapping[str, float]] = {}
KEPT = "version_{:08d}.safetensors"
"""Files of a checkpoint with older versions that the steps after it are written with."""


@dataclass(frozen=True)
class Freshness:
    """How old the student may be that writes."""

    staleness: int
    newest: bool
    board: Any

    def due(self, step: int) -> int:
        """Finished steps of the oldest student that may write step `step` (from 1); exactly it writes unless `newest`."""
        return max(0, step - 1 - self.staleness)

    def gate(self, attempt: int, step: int) -> dict[str, float]:
        """Returns when the version that step `step` needs is out, with the values that controllers had then."""
        values: dict[str, float] = ray.get(self.board.wait_for_version.remote(attempt, self.due(step)))
        return values

    def version(self, attempt: int, step: int) -> tuple[int, Any]:
        """The version that writes step `step`, and the reference to its weights."""
        found: tuple[int, list[Any]] = ray.get(self.board.version.remote(attempt, None if self.newest else self.due(step)))
        return found[0], found[1][0]


class FollowingEngine:
    """Gives an engine the weights that a bundle is to be written with."""

    def __init__(self, engine: Engine, freshness: Freshness):
        if not isinstance(engine, Follower):
            raise ValueError(f"the student's endpoint: got a {type(engine).__name__}; expected an engine that takes published weights")
        self._engine, self._freshness = engine, freshness
        self._has: tuple[int, int] | None = None

    def follow(self, columns: Columns) -> Columns:
        """Publishes the due version to the engine unless it has it; the bundle with `policy_version`. Held-out rows need none."""
        step, attempt = scalar(columns, "step"), scalar(columns, "attempt")
        if step == HELD_OUT_STEP:
            return {**columns, VERSION: np.asarray([-1], dtype=np.int64)}
        number, weights = self._freshness.version(attempt, step)
        if self._has != (attempt, number):
            self._engine.publish(_tensors(ray.get(weights)), number)
            self._has = (attempt, number)
        return {**columns, VERSION: np.asarray([number], dtype=np.int64)}


class Publisher:
    """A training worker's side: gathers the student from any layout and sends it out once. Every rank calls every method."""

    def __init__(self, board: Any, layout: Layout, rank: int, staleness: int, adapter_scale: float | None):
        self._board, self._layout, self._rank, self._scale = board, layout, rank, adapter_scale
        self._recent: deque[tuple[int, Any]] = deque(maxlen=staleness + 1)
        self._controls: Mapping[int, Mapping[str, float]] = {}
        self._attempt = 0
        self._ended = threading.Event()

    def begin(
        self,
        attempt: int,
        step: int,
        older: Mapping[int, Mapping[str, Tensor]],
        controls: Mapping[int, Mapping[str, float]] = NO_CONTROLS,
    ) -> None:
        """Speaks for `attempt`; sends the versions that a checkpoint kept, then the student after `step` steps. With every version go
        the values of controllers that `controls` holds for it by then."""
        self._attempt, self._controls = attempt, controls
        for number in sorted(older):
            self._send(number, dict(older[number]))
        self.publish(step)
        if self._rank == 0:
            threading.Thread(target=self._repeat, name="versions", daemon=True).start()

    def end(self) -> None:
        """Nothing is sent any more."""
        self._ended.set()

    def publish(self, step: int) -> None:
        """Sends the student after `step` finished steps. Collective."""
        from orchestrator.published import published_weights

        weights = published_weights(self._layout, self._scale)
        if self._rank == 0:
            self._send(step, weights)

    def keep(self, folder: Path) -> None:
        """Writes the older versions that a resumed run needs into a checkpoint's folder, on rank 0."""
        from safetensors.torch import save_file

        for number, reference in list(self._recent)[:-1]:
            save_file({name: value.clone() for name, value in _tensors(ray.get(reference)).items()}, folder / KEPT.format(number))

    def _send(self, step: int, weights: dict[str, Tensor]) -> None:
        if self._rank != 0:
            return
        reference = ray.put(_arrays(weights))
        self._recent.append((step, reference))
        self._tell()

    def _tell(self) -> None:
        recent = list(self._recent)
        values = {step: dict(self._controls.get(step, {})) for step, _ in recent}
        self._board.publish.remote(self._attempt, {step: [reference] for step, reference in recent}, values)

    def _repeat(self) -> None:
        """Tells it again and again: a board that was restarted knows nothing, and everybody may be waiting for it."""
        while not self._ended.wait(REPEAT_SECONDS):
            self._tell()


Arrays = dict[str, tuple[str, Any]]
"""Dtype and values by name. Arrays travel through the object store without a copy, and numpy knows no bfloat16."""


def _arrays(weights: Mapping[str, Tensor]) -> Arrays:
    import torch

    def plain(value: Tensor) -> Any:
        return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()

    return {name: (str(value.dtype).removeprefix("torch."), plain(value)) for name, value in weights.items()}


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to them
        made = {name: (dtype, torch.from_numpy(values)) for name, (dtype, values) in arrays.items()}
    return {name: value.view(torch.bfloat16) if dtype == "bfloat16" else value for name, (dtype, value) in made.items()}


def kept_versions(folder: Path) -> dict[int, dict[str, Tensor]]:
    """The older versions in a checkpoint's folder, by their steps."""
    from safetensors.torch import load_file

    return {int(path.stem.partition("_")[2]): load_file(path) for path in folder.glob("version_*.safetensors")}
