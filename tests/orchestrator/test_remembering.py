"""What a training worker writes down of its texts, and what it may forget."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cluster.rollout_log import RolloutLog
from cluster.storage import Folder
from orchestrator.checkpoint import PROGRESS, SNAPSHOT, Position
from orchestrator.remembering import Remembering, rollout_log
from strategies.core import Columns, Sampling
from strategies.schedule import constant
from strategies.stages.lines import Line, joined
from strategies.stages.replay import Replay
from strategies.stages.rollout import Rollout

STALENESS, STEPS = 1, 9
STAGE = Replay(Rollout(Sampling(), staleness=STALENESS), constant(0.5), capacity_rows=4)


def bundle(step: int) -> Columns:
    """Two new texts, one recalled, one of the data's own."""
    version = max(0, step - 1 - STALENESS)
    token, mask = np.asarray([step, step], np.int32), np.asarray([0, 1], np.uint8)
    lines = [Line(token, mask, row, np.zeros(1, np.float32), token, written_by=by) for row, by in enumerate((version, -1, version, -7))]
    return {**joined(lines), "policy_version": np.asarray([version], np.int64), "teacher/logprob": np.zeros(4, np.float32)}


@pytest.fixture
def log(tmp_path: Path) -> RolloutLog:
    return rollout_log(Folder(str(tmp_path)))


def written(log: RolloutLog) -> Remembering:
    memory = Remembering(log, STAGE, 0)
    for step in range(1, STEPS + 1):
        memory.write(step, [bundle(step)])
    return memory


def committing(folder: Path, step: int) -> Folder:
    """A run whose newest committed checkpoint is of `step`; it has none of 0."""
    run = Folder(str(folder))
    if step:
        run.write(f"kept/{PROGRESS}", json.dumps(asdict(Position(step, 1, {}))).encode())
        run.write(SNAPSHOT, b'{"latest_checkpoint_result": {"checkpoint_dir_name": "kept"}}')
    return run


def steps(log: RolloutLog) -> list[int]:
    return [int(name) for name in log.folder.names()]


def test_new_texts_alone_are_written_down_without_what_teachers_said(log: RolloutLog) -> None:
    written(log)
    (part,) = log.read(5)
    assert part["row_id"].tolist() == [0, 2] and part["written_by"].tolist() == [3, 3] and "teacher/logprob" not in part


@pytest.mark.parametrize(("committed", "first"), [(0, 1), (2, 1), (3, 1), (6, 4), (9, 7)])
@pytest.mark.parametrize("restarted", [False, True])
def test_what_a_run_that_goes_back_would_recall_stays(log: RolloutLog, tmp_path: Path, committed: int, first: int, restarted: bool) -> None:
    memory = written(log)
    memory = Remembering(log, STAGE, 0) if restarted else memory
    memory.forget(committing(tmp_path, committed))  # after 6 steps, step 7 recalls 4 texts of steps up to 5
    assert steps(log) == list(range(first, STEPS + 1))


@pytest.mark.parametrize("snapshot", [b"", b'{"latest_checkpoint_res', b'{"latest_checkpoint_result": {"checkpoint_dir_name": "gone"}}'])
def test_a_snapshot_that_is_just_written_forgets_nothing(log: RolloutLog, tmp_path: Path, snapshot: bytes) -> None:
    memory = written(log)
    (tmp_path / SNAPSHOT).write_bytes(snapshot)
    memory.forget(Folder(str(tmp_path)))
    assert steps(log) == list(range(1, STEPS + 1))


def test_other_ranks_leave_the_log_alone(log: RolloutLog, tmp_path: Path) -> None:
    written(log)
    other = Remembering(log, STAGE, 1)
    other.forget(committing(tmp_path, 9))
    other.begin(3)
    assert steps(log) == list(range(1, STEPS + 1))
    Remembering(log, STAGE, 0).begin(3)
    assert steps(log) == [1, 2, 3]
