"""Numbers of a step's texts, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.rollout_metrics import oldest_steps, rollout_metrics, rollout_sums
from orchestrator.step_metrics import stream_metrics
from strategies.core import Columns

BUNDLES = ("step", "policy_version", "rollout/left_out", "rollout/seconds")
"""Columns of a bundle as a whole."""


def bundle() -> Columns:
    """A row of the data's, a text that repeats one token, and one that does not and was cut off."""
    given, dull, cut = [9, 1, 2], [9, 5, 5, 5, 5, 5, 5], [9, 1, 2, 3, 4]
    return {
        "tokens": np.asarray([*given, *dull, *cut], np.int32),
        "lengths": np.asarray([3, 7, 5], np.int32),
        "loss_mask": np.asarray([0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1], np.uint8),
        "written": np.asarray([0, 1, 1], np.uint8),
        "finished": np.asarray([1, 1, 0], np.uint8),
        "behaviour": np.asarray([0, 0, *[-0.5] * 6, *[-2.0] * 4], np.float32),
        "rollout/left_out": np.asarray([3], np.float32),
        "rollout/seconds": np.asarray([0.25], np.float32),
        "step": np.asarray([9], np.int64),
        "policy_version": np.asarray([7], np.int64),
        "written_by": np.asarray([-1, 7, 3], np.int64),
    }


def test_a_steps_texts_in_numbers() -> None:
    found = rollout_metrics(rollout_sums(bundle()), oldest_steps(bundle()))
    assert found["rollout/share"] == pytest.approx(2 / 3) and found["rollout/length"] == 5 and found["rollout/finished"] == 0.5
    assert found["rollout/surprise"] == pytest.approx((6 * 0.5 + 4 * 2.0) / 10)
    assert found["rollout/repeated"] == pytest.approx(2 / 4)  # three equal pieces of the dull text, one of the other
    assert found["age_steps"] == (1 + 5) / 2 and found["oldest_steps"] == 5 and found["rollout/recalled"] == pytest.approx(1 / 3)
    assert found["rollout/left_out"] == 3 and found["write_seconds"] == 0.25


def test_bundles_add_up_and_one_without_texts_has_none() -> None:
    twice = np.add(rollout_sums(bundle()), rollout_sums(bundle()))
    once, both = rollout_metrics(rollout_sums(bundle()), 5.0), rollout_metrics(twice.tolist(), 5.0)
    assert all(both[name] == pytest.approx(once[name]) for name in once if name not in ("rollout/left_out", "write_seconds"))
    plain = bundle()
    del plain["written"]
    assert rollout_metrics(rollout_sums(plain), oldest_steps(plain)) == {}
    silent = bundle() | {"written": np.zeros(3, np.uint8)}
    found = rollout_metrics(rollout_sums(silent), oldest_steps(silent))
    assert found["rollout/length"] == found["oldest_steps"] == 0 and "age_steps" not in found


def test_verdicts_count_where_there_are_any() -> None:
    verdicts: Columns = {
        "reward": np.asarray([0, 0.75, 0], np.float32),
        "judged": np.asarray([0, 1, 1], np.uint8),
        "judge/failed": np.asarray([2], np.int64),
        "judge/unjudgeable": np.asarray([1], np.int64),
        "judge/seconds": np.asarray([0.5], np.float32),
    }
    found = rollout_metrics(rollout_sums(bundle() | verdicts), 0)
    assert found["rollout/reward"] == 0.375 and found["rollout/passed"] == 0.5
    assert (found["rollout/judge_failed"], found["rollout/unjudgeable"], found["judge_seconds"]) == (2, 1, 0.5)
    nobody = rollout_metrics(rollout_sums(bundle() | verdicts | {"judged": np.zeros(3, np.uint8)}), 0)
    assert nobody["rollout/reward"] == 0 and nobody["rollout/passed"] == 0


def test_what_stages_count_is_logged_beside_what_texts_were_like() -> None:
    control = {name: np.asarray([1], np.int64) for name in ("step", "rows_total")}
    counted = {"count/repair/failed": np.asarray([2], np.float32), "count/a": np.asarray([5], np.float32)}
    found = stream_metrics({**bundle(), **control, **counted, "row_id": np.asarray([4, 4, 6])}, {}, 0.0, 0.5)
    assert (found["repair/failed"], found["a"], found["rollout/length"]) == (2, 5, 5)
    assert (found["tokens"], found["row_id_sum"], found["stream_wait_seconds"]) == (15, 14, 0.5)


def test_a_bundle_without_rows_has_zeros() -> None:
    empty = {name: values[:0] if name not in BUNDLES else values for name, values in bundle().items()}
    found = rollout_metrics(rollout_sums(empty), oldest_steps(empty))
    assert found["rollout/length"] == found["rollout/share"] == 0 and found["rollout/left_out"] == 3


def test_texts_of_a_snapshot_are_as_old_as_the_run_and_not_recalled() -> None:
    snapshot = {name: values for name, values in bundle().items() if name != "policy_version"} | {"written_by": np.asarray([-1, 0, 0])}
    found = rollout_metrics(rollout_sums(snapshot), oldest_steps(snapshot))
    assert (found["age_steps"], found["rollout/recalled"]) == (8, 0)
