"""What the student wrote, kept for later steps of the same run: a training worker's side of the rollout log, and the door's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.config import EndpointConfig, ReplayEndpoint
from cluster.rollout_log import RolloutLog
from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.collective import gather, world_size
from orchestrator.errors import Refusal
from strategies.core import Columns, Strategy
from strategies.stages.replay import Replay, fresh_rows, replays

if TYPE_CHECKING:
    from orchestrator.data import PreparedData
    from orchestrator.order import Order

ROLLOUTS = "rollouts"
"""The log's folder in that of the run."""


class Remembering:
    """Writes every step's texts down before the student that the step made goes out: whoever waits for that student finds them."""

    def __init__(self, log: RolloutLog, stage: Replay, rank: int):
        self._log, self._stage, self._rank = log, stage, rank
        self._texts: dict[int, int] = {}

    def begin(self, step: int) -> None:
        """A run that goes on after `step` forgets what an earlier attempt wrote for later steps."""
        if self._rank == 0:
            self._log.forget_after(step)

    def write(self, step: int, bundles: Sequence[Columns]) -> None:
        """The texts of a step's bundles that are new. Collective: returns once every rank has written."""
        texts = [fresh_rows(bundle) for bundle in bundles]
        for i, part in enumerate(texts):
            self._log.write(step, self._rank + i * world_size(), part)
        self._texts[step] = int(gather([float(sum(len(part["row_id"]) for part in texts))]).sum())

    def forget(self, run: Folder) -> None:
        """Removes what no step recalls that follows the newest committed checkpoint of `run`, to which the run may have to go back."""
        committed = newest_commit(run) if self._rank == 0 else 0
        if not committed:
            return
        step, lacking = committed - self._stage.rollout.staleness, self._stage.capacity_rows
        while step > 0 and lacking > 0:
            lacking -= self._count(step)
            step -= 1
        self._log.forget_before(step + 1)
        self._texts = {s: count for s, count in self._texts.items() if s > step}

    def _count(self, step: int) -> int:
        """Texts of a step over all ranks."""
        if step not in self._texts:
            self._texts[step] = sum(len(part["row_id"]) for part in self._log.read(step))
        return self._texts[step]


def rollout_log(run: Folder) -> RolloutLog:
    """The log of a run, in its folder."""
    return RolloutLog(run.child(ROLLOUTS))


def newest_commit(run: Folder) -> int:
    """Finished steps of a run's newest committed checkpoint; 0 where there is none, or Ray is just writing down which it is."""
    try:
        last = checkpoint.committed(run)
        return checkpoint.read_position(last).step if last else 0
    except (json.JSONDecodeError, FileNotFoundError):  # half of a snapshot, or a checkpoint that has given way to a newer one
        return 0


def with_log(endpoints: Mapping[str, EndpointConfig], strategy: Strategy, run: Folder) -> dict[str, EndpointConfig]:
    """The endpoints of a run, of which those that recall texts know its folder. `Refusal` for one that a recipe has put in their place,
    or for such a one that it has put elsewhere."""
    recalling = {stage.endpoint for stage in replays(strategy.stages)}
    found = dict(endpoints)
    for name, config in endpoints.items():
        if isinstance(config, ReplayEndpoint) and not config.folder and name in recalling:
            found[name] = config.model_copy(update={"folder": rollout_log(run).folder.root})
        elif isinstance(config, ReplayEndpoint) or name in recalling:
            do = f"Leave endpoints.{name} out, or give it another name: a run that recalls its own texts brings what it needs."
            expected = "nothing: the run remembers by itself" if name in recalling else "an endpoint that scores, writes or judges"
            raise Refusal(f"endpoints.{name}", f"engine {config.engine!r}", expected, do)
    return found


def about_memory(strategy: Strategy, order: Order, data: PreparedData) -> list[str]:
    """A warning where the rows of a whole run are too few to recall any."""
    rows = order.about_rows(data.train.tokens / data.train.rows)
    few = [s for s in replays(strategy.stages) if s.capacity_rows > rows * s.rollout.sampling.samples]
    return [f"nothing is recalled: the whole run has {rows:,.0f} rows, and replay_rows is {s.capacity_rows:,}. Lower it." for s in few]
