"""The rollout log: whole steps, the newest first, and nothing of a future that a run has taken back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.config import ReplayEndpoint
from cluster.endpoints import make_engine
from cluster.engines import Columns
from cluster.engines.replay import ReplayEngine
from cluster.rollout_log import RolloutLog
from cluster.storage import Folder


def texts(step: int, count: int) -> Columns:
    return {"lengths": np.full(count, 2, np.int32), "tokens": np.full(2 * count, step, np.int32)}


@pytest.fixture
def log(tmp_path: Path) -> RolloutLog:
    found = RolloutLog(Folder(str(tmp_path)))
    for step in range(1, 6):
        for part in (0, 1):
            found.write(step, part, texts(step, 3 * part))
    return found


def engine(log: RolloutLog) -> ReplayEngine:
    found = make_engine(ReplayEndpoint(engine="replay", folder=log.folder.root))
    assert isinstance(found, ReplayEngine)
    return found


@pytest.mark.parametrize(("through", "rows", "steps"), [(5, 3, [5]), (4, 4, [3, 4]), (4, 6, [3, 4]), (3, 99, [1, 2, 3]), (1, 1, [1])])
def test_the_newest_steps_that_hold_enough_rows_are_recalled(log: RolloutLog, through: int, rows: int, steps: list[int]) -> None:
    found = engine(log).recall(through, rows)
    assert found["log_step"].tolist() == [s for s in steps for _ in range(3)]
    assert found["tokens"].tolist() == [s for s in steps for _ in range(6)] and found["tokens"].dtype == np.int32


def test_before_the_first_step_there_is_nothing(log: RolloutLog) -> None:
    assert engine(log).recall(0, 9) == {}


def test_a_step_is_read_once(log: RolloutLog) -> None:
    recalling = engine(log)
    recalling.recall(4, 6)
    log.write(3, 0, texts(9, 1))
    assert set(recalling.recall(5, 9)["tokens"].tolist()) == {3, 4, 5}


def test_a_step_that_is_lost_is_named(log: RolloutLog) -> None:
    log.folder.child("00000002").clear()
    assert engine(log).recall(5, 9)["log_step"].tolist() == [3] * 3 + [4] * 3 + [5] * 3
    with pytest.raises(FileNotFoundError, match="step 2"):
        engine(log).recall(5, 10)


def test_a_run_that_goes_on_takes_back_later_steps_of_any_number_of_workers(log: RolloutLog) -> None:
    log.write(4, 7, texts(4, 1))
    log.forget_after(3)
    log.write(4, 0, texts(4, 2))
    assert engine(log).recall(4, 99)["log_step"].tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 2
    with pytest.raises(FileNotFoundError):
        log.read(5)


def test_what_nobody_reads_again_is_removed(log: RolloutLog) -> None:
    log.forget_before(4)
    assert log.folder.names() == ["00000004", "00000005"]


def test_it_has_no_opinion(log: RolloutLog) -> None:
    with pytest.raises(ValueError, match="recalls"):
        engine(log).score({}, None)  # type: ignore[arg-type]
