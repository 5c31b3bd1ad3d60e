"""An engine that recalls what students wrote in earlier steps of the same run: no model, no forward."""

from __future__ import annotations

import numpy as np

from cluster.config import ReplayEndpoint
from cluster.engines import Columns, Request
from cluster.rollout_log import RolloutLog
from cluster.storage import Folder

LOG_STEP = "log_step"


class ReplayEngine:
    """Answers from a run's rollout log, of which it keeps the newest steps in memory."""

    def __init__(self, config: ReplayEndpoint):
        self._log = RolloutLog(Folder(config.folder))
        self._steps: dict[int, Columns] = {}

    def score(self, columns: Columns, request: Request) -> Columns:
        """`ValueError`: it has no opinion."""
        raise ValueError("score: got an endpoint that recalls texts; expected one that loads a model")

    def recall(self, through: int, rows: int) -> Columns:
        """The rows of the newest of the steps 1 to `through`, of as few whole steps as hold `rows` rows, with `log_step` (R,) int64,
        the step that each was written for. `FileNotFoundError` for a step that the log lacks."""
        found: dict[int, Columns] = {}
        lacking = rows
        for step in range(through, 0, -1):
            if lacking <= 0:
                break
            found[step] = self._steps.get(step) or self._read(step)
            lacking -= len(found[step][LOG_STEP])
        self._steps = found
        parts = [found[step] for step in sorted(found)]
        return {name: np.concatenate([p[name] for p in parts]) for name in (parts[0] if parts else ())}

    def _read(self, step: int) -> Columns:
        parts = self._log.read(step)
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return {**columns, LOG_STEP: np.full(len(columns["lengths"]), step, dtype=np.int64)}
