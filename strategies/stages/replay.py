"""Replay: texts that the student wrote in earlier steps take the place of some that it would write now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from strategies.control import told
from strategies.core import Columns, Endpoint, Progress, Schedule, Stage
from strategies.domains import DOMAIN
from strategies.stages.lines import LINE_COLUMNS, ROWS, Line, lines_of, replaced
from strategies.stages.rollout import Rollout

REPLAY = "replay"
"""The endpoint that remembers what the student wrote."""
LOG_STEP = "log_step"


@runtime_checkable
class Recaller(Protocol):
    """An endpoint that remembers what the student wrote."""

    def recall(self, through: int, rows: int) -> Columns:
        """What it wrote in the newest of the steps 1 to `through`: of as few whole steps as hold `rows` rows together, of all where
        there are fewer. Columns of `fresh_rows`, in any order, and `log_step` (R,) int64, the step that each was written for."""
        ...


@dataclass(frozen=True)
class Replay:
    """Recalls texts of earlier steps in place of `share` of the rows that `rollout`, the stage after it, would write.

    Of every row `rollout` draws a number u and writes where u < phi, its own share; this stage takes those with
    `phi (1 - share) <= u < phi`. All texts of one prompt at one step are recalled together; which, is drawn by seed, step and row,
    with replacement, among the newest steps that hold `capacity_rows` rows. They end at the step after which the student that is due
    went out, so that all of its texts are known and a retry finds the same. While there are fewer rows than that, nothing is recalled
    and the student writes. With a share of n / N at step n of N these are the rules of DistiLLM (arXiv:2402.03898) in its released
    code, which draws without replacement, and a whole batch at a time.

    Recalled rows keep their writer's log-probabilities and its age; teachers score them anew. Adds the columns of `Rollout` about
    rows; those that are not recalled are as the data has them, and `rollout` fills in the rest.
    """

    rollout: Rollout
    share: Schedule
    capacity_rows: int = 1000
    endpoint: str = REPLAY

    @property
    def needs(self) -> frozenset[str]:
        return self.rollout.needs

    @property
    def adds(self) -> frozenset[str]:
        return LINE_COLUMNS

    def __call__(self, columns: Columns, endpoint: Endpoint | Recaller | None) -> Columns:
        if not isinstance(endpoint, Recaller):
            raise ValueError(f"stage Replay needs an endpoint that remembers; {self.endpoint!r} does not")
        step = int(columns["step"][0])
        wanted = self._wanted(columns, step)
        known = self._known(endpoint, step - 1 - self.rollout.staleness) if wanted.any() else []
        found: list[Line] = []
        for line, recall in zip(lines_of(columns), wanted.tolist(), strict=True):
            found += known[self._which(step, line.row_id, len(known))] if recall and known else [line]
        return replaced(columns, found)

    def _wanted(self, columns: Columns, step: int) -> NDArray[np.bool_]:
        """Rows that are recalled once there are enough to draw from, `(R,)`."""
        if step == 0:
            return np.zeros(len(columns["row_id"]), dtype=bool)
        share = self.share(Progress(step - 1, int(columns["steps"][0]), told(columns)))
        return self.rollout.drawn(columns) & ~self.rollout.drawn(columns, 1.0 - share)

    def _known(self, endpoint: Recaller, through: int) -> list[list[Line]]:
        """The texts of each prompt and step that may be recalled, in one order whoever wrote them down; none while there are few."""
        columns = endpoint.recall(through, self.capacity_rows) if through > 0 else {}
        if not columns or len(columns["row_id"]) < self.capacity_rows:
            return []
        lines = sorted(zip(columns[LOG_STEP].tolist(), lines_of(columns), strict=True), key=lambda s: (s[0], s[1].row_id, s[1].sample))
        return [[line for _, line in texts] for _, texts in groupby(lines, key=lambda s: (s[0], s[1].row_id))]

    def _which(self, step: int, row_id: int, texts: int) -> int:
        return int(np.random.default_rng((self.rollout.sampling.seed, step, row_id, 1)).integers(texts))


def fresh_rows(columns: Columns) -> Columns:
    """The rows of a bundle that its own student wrote, `policy_version`, as `Recaller` tells them."""
    version = int(columns["policy_version"][0])
    known = {name: columns[name] for name in ROWS | LINE_COLUMNS | {DOMAIN} if name in columns}
    return replaced(known, [line for line in lines_of(columns) if line.written_by == version])


def replays(stages: Sequence[Stage]) -> list[Replay]:
    """Those of `stages` that recall what the student wrote."""
    return [s for s in stages if isinstance(s, Replay)]
