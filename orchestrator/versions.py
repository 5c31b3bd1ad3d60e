"""Student versions: who may write with which, where a writer finds it, and how a training worker sends one out.

A version is (attempt, finished optimizer steps). Rank 0 puts the gathered weights into Ray's object store and tells the board; the
reader holds a step's rows back until the version that they are to be written with is there; a writer's process takes exactly that
one, once, and so does a teacher's that follows the student. So neither blocks in flight, nor prefetching, nor the number of workers or
writers can make a row older than it may be.

A version carries several sets of weights by name: the student's own, moving averages of it, and what a LoRA student adapts where only
its adapter is sent.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from cluster.engines import Follower
from orchestrator.adapters import merged
from orchestrator.bundle import HELD_OUT_STEP, scalar

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.engines import Engine
    from orchestrator.layouts import Layout
    from orchestrator.published import Average
    from strategies.core import Columns

VERSION = "policy_version"
"""Control column: the version that a bundle was written with."""
STUDENT_WEIGHTS = "student"
"""Name of the student's own set of weights; an average's is the name of the endpoint that has it."""
BASE_WEIGHTS = "student's base"
"""Name of what the student adapts, beside which its own set is an adapter."""
BEGINNING = -1
"""In place of a number of steps: the student as its attempt began, which is kept until held-out rows are scored."""
REPEAT_SECONDS = 5.0
NO_CONTROLS: Mapping[int, Mapping[str, float]] = {}
KEPT = "version_{:08d}.safetensors"
"""Files of a checkpoint with older versions that the steps after it are written with, and the averages of its own."""


@dataclass(frozen=True)
class Freshness:
    """How old the student may be that writes."""

    staleness: int
    newest: bool
    board: Any
    weights: str = STUDENT_WEIGHTS
    """Which of a version's sets an engine takes."""
    transport: str | None = None
    """How weights travel past Ray's object store; None where they go through it."""

    def due(self, step: int) -> int:
        """Finished steps of the oldest student that may write step `step` (from 1); exactly it writes unless `newest`."""
        return max(0, step - 1 - self.staleness)

    def gate(self, attempt: int, step: int) -> dict[str, float]:
        """Returns when the version that step `step` needs is out, with the values that controllers had then."""
        values: dict[str, float] = ray.get(self.board.wait_for_version.remote(attempt, self.due(step)))
        return values

    def version(self, attempt: int, number: int | None) -> tuple[int, Mapping[str, list[Any]]]:
        """Version `number`, the newest without one, with the references to its sets of weights."""
        found: tuple[int, Mapping[str, list[Any]]] = ray.get(self.board.version.remote(attempt, number))
        return found


class FollowingEngine:
    """Gives an engine the weights that a bundle is to be written or scored with."""

    def __init__(self, engine: Engine, freshness: Freshness):
        if not isinstance(engine, Follower):
            raise ValueError(f"the student's endpoint: got a {type(engine).__name__}; expected an engine that takes published weights")
        self._engine, self._freshness = engine, freshness
        self._has: tuple[int, int] | None = None
        self._base: tuple[int, Mapping[str, Tensor]] | None = None

    def follow(self, columns: Columns) -> Columns:
        """Publishes the due version to the engine unless it has it; the bundle with `policy_version`. That is the version that an
        earlier stage had, if there was one, and `BEGINNING` for held-out rows."""
        attempt = scalar(columns, "attempt")
        number, sets = self._freshness.version(attempt, self._wanted(columns))
        if self._has != (attempt, number):
            self._engine.publish(self._whole(attempt, sets), number)
            self._has = (attempt, number)
        return {**columns, VERSION: np.asarray([number], dtype=np.int64)}

    def _wanted(self, columns: Columns) -> int | None:
        step = scalar(columns, "step")
        if step == HELD_OUT_STEP:
            return BEGINNING
        if VERSION in columns:
            return scalar(columns, VERSION)
        return None if self._freshness.newest else self._freshness.due(step)

    def _whole(self, attempt: int, sets: Mapping[str, list[Any]]) -> Mapping[str, Tensor]:
        """The engine's set, merged where it is an adapter; what it adapts is taken once and stays in the object store."""
        own = _fetched(sets[self._freshness.weights])
        if BASE_WEIGHTS not in sets or self._freshness.weights != STUDENT_WEIGHTS:
            return own
        if self._base is None or self._base[0] != attempt:
            self._base = (attempt, _fetched(sets[BASE_WEIGHTS]))
        return merged(self._base[1], own)


@dataclass(frozen=True)
class Parcel:
    """What a version carries."""

    adapter_scale: float | None = None
    """Of a LoRA student's product; None without LoRA."""
    adapter_only: bool = False
    """Sends the factors with every version and what they adapt once, instead of merged weights."""
    averages: Mapping[str, Average] = field(default_factory=dict)
    """Moving averages of the student, by the name of their set."""
    transport: str | None = None
    """See `Freshness.transport`."""
    weights: bool = True
    """Whether somebody follows the student; else nothing but the values of controllers goes out."""


class Publisher:
    """A training worker's side: gathers the student from any layout and sends it out once. Every rank calls every method."""

    def __init__(self, board: Any, layout: Layout, rank: int, staleness: int, parcel: Parcel):
        self._board, self._layout, self._rank, self._parcel = board, layout, rank, parcel
        self._recent: deque[tuple[int, Sets]] = deque(maxlen=staleness + 1)
        self._beginning: dict[int, Sets] = {}
        self._base: Sets = {}
        self._controls: Mapping[int, Mapping[str, float]] = {}
        self._attempt = 0
        self._ended = threading.Event()

    def begin(
        self,
        attempt: int,
        step: int,
        kept: Mapping[int, Mapping[str, Mapping[str, Tensor]]],
        controls: Mapping[int, Mapping[str, float]] = NO_CONTROLS,
    ) -> None:
        """Speaks for `attempt`; sends the versions that a checkpoint kept, then the student after `step` steps. With every version go
        the values of controllers that `controls` holds for it by then."""
        self._attempt, self._controls = attempt, controls
        self._base = self._adapted()
        for number in sorted(kept if self._parcel.weights else controls):
            if number < step:
                self._send(number, kept.get(number, {}))
        student = self._gathered()
        if self._rank == 0:
            for name, average in self._parcel.averages.items():
                average.weights = dict(kept.get(step, {}).get(name, {}))
                average.begin(student)
            self._send(step, self._sets(student))
            self._beginning = {BEGINNING: self._recent[-1][1]}
            self._tell()
            threading.Thread(target=self._repeat, name="versions", daemon=True).start()

    def settled(self) -> None:
        """Held-out rows are scored: nobody asks for the beginning any more."""
        self._beginning = {}

    def end(self) -> None:
        """Nothing is sent any more."""
        self._ended.set()

    def publish(self, step: int) -> None:
        """Sends the student after `step` finished steps, and its averages, which take it in. Collective."""
        student = self._gathered()
        if self._rank == 0:
            for average in self._parcel.averages.values():
                average.follow(student)
            self._send(step, self._sets(student))

    def keep(self, folder: Path) -> None:
        """Writes what a resumed run needs into a checkpoint's folder, on rank 0: older versions, and the averages of the newest."""
        from safetensors.torch import save_file

        *older, (newest, sets) = list(self._recent)
        for number, kept in [*older, (newest, {n: s for n, s in sets.items() if n in self._parcel.averages})]:
            weights = {f"{name}/{n}": v.clone() for name, references in kept.items() for n, v in _fetched(references).items()}
            if weights:
                save_file(weights, folder / KEPT.format(number))

    def _gathered(self) -> dict[str, Tensor]:
        """The student's own set, on rank 0."""
        if not self._parcel.weights:
            return {}
        from orchestrator.published import published_adapter, published_weights

        scale = self._parcel.adapter_scale
        if scale is None or not self._parcel.adapter_only:
            return published_weights(self._layout, scale)
        return published_adapter(self._layout, scale)

    def _adapted(self) -> Sets:
        """What every version's adapter belongs to."""
        if not self._parcel.adapter_only:
            return {}
        from orchestrator.published import published_base

        base = published_base(self._layout)
        return {} if self._rank else {BASE_WEIGHTS: [_put(base, self._parcel.transport)]}

    def _sets(self, student: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        if not self._parcel.weights:
            return {}
        return {STUDENT_WEIGHTS: student, **{name: average.weights for name, average in self._parcel.averages.items()}}

    def _send(self, step: int, sets: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self._rank != 0:
            return
        self._recent.append((step, {name: [_put(weights, self._parcel.transport)] for name, weights in sets.items()}))
        self._tell()

    def _tell(self) -> None:
        versions = {**self._beginning, **dict(list(self._recent))}
        values = {step: dict(self._controls.get(step, {})) for step in versions}
        self._board.publish.remote(self._attempt, {step: {**self._base, **sets} for step, sets in versions.items()}, values)

    def _repeat(self) -> None:
        """Tells it again and again: a board that was restarted knows nothing, and everybody may be waiting for it."""
        while not self._ended.wait(REPEAT_SECONDS):
            self._tell()


Sets = Mapping[str, list[Any]]
"""Sets of weights by name, each a list of one reference to `Arrays`, or `orchestrator.direct.Packed`, which Ray passes on without fetching
it."""
Arrays = dict[str, tuple[str, Any]]
"""Dtype and values by name. Arrays travel through the object store without a copy, and numpy knows no bfloat16."""


def _put(weights: Mapping[str, Tensor], transport: str | None) -> Any:
    """A reference to the weights."""
    if transport is None:
        return ray.put(_arrays(weights))
    from orchestrator.direct import sent

    return sent(weights, transport)


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


def _fetched(references: list[Any]) -> dict[str, Tensor]:
    found = ray.get(references[0])
    if isinstance(found, dict):
        return _tensors(found)
    direct: dict[str, Tensor] = found.unpacked()
    return direct


def kept_versions(folder: Path) -> dict[int, dict[str, dict[str, Tensor]]]:
    """What a checkpoint's folder keeps of versions: sets of weights by name, by steps."""
    from safetensors.torch import load_file

    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for path in folder.glob("version_*.safetensors"):
        sets = found.setdefault(int(path.stem.partition("_")[2]), {})
        for key, value in load_file(path).items():
            name, _, weight = key.rpartition("/")
            sets.setdefault(name or STUDENT_WEIGHTS, {})[weight] = value
    return found
