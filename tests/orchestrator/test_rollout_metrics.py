"""Numbers of a step's texts, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.display import step_words
from orchestrator.rollout_metrics import fates, oldest_steps, rollout_metrics, rollout_sums
from orchestrator.step_metrics import stream_metrics
from strategies.core import Columns, Strategy
from strategies.domains import domain_id
from strategies.personalised import Personalised
from strategies.self_distillation import OPSD

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
    once = rollout_metrics(rollout_sums(bundle()), 5.0)
    both = rollout_metrics({name: 2 * value for name, value in rollout_sums(bundle()).items()}, 5.0)
    assert all(both[name] == pytest.approx(once[name]) for name in once if name not in ("rollout/left_out", "write_seconds"))
    plain = bundle()
    del plain["written"]
    assert rollout_metrics(rollout_sums(plain), oldest_steps(plain)) == {}
    silent = bundle() | {"written": np.zeros(3, np.uint8)}
    found = rollout_metrics(rollout_sums(silent), oldest_steps(silent))
    assert found["rollout/share"] == 0 and "rollout/length" not in found and "rollout/surprise" not in found  # a mean over nothing is none


def test_each_domain_has_the_share_of_its_judged_texts_that_failed() -> None:
    verdicts = {
        "written": np.ones(3, np.uint8),
        "reward": np.asarray([1, 0, 0], np.float32),
        "judged": np.asarray([1, 1, 1], np.uint8),
        "row_id": np.arange(3),
        "domain": np.asarray([domain_id(d) for d in ("code", "code", "prose")], np.int64),
        **{f"judge/{name}": np.zeros(1, np.float32) for name in ("failed", "unjudgeable", "seconds")},
    }
    found = rollout_metrics(rollout_sums(bundle() | verdicts, domains=("code", "prose", "maths")), 0.0)
    told = {name: value for name, value in found.items() if name.startswith("rollout/failed/")}
    assert told == {"rollout/failed/code": 0.5, "rollout/failed/prose": 1.0}
    assert "rollout/failed/code" not in rollout_metrics(rollout_sums(bundle() | verdicts), 0.0)


def test_the_distance_to_a_base_is_that_of_written_tokens() -> None:
    base = np.asarray([-9, -9, *[-1.5] * 6, *[-1.0] * 4], np.float32)  # of the data's own two tokens nobody asks
    found = rollout_metrics(rollout_sums(bundle() | {"start/logprob": base}, "start"), 0.0)
    assert found["rollout/kl_to_base"] == pytest.approx((6 * (1.5 - 0.5) + 4 * (1.0 - 2.0)) / 10)
    assert "rollout/kl_to_base" not in rollout_metrics(rollout_sums(bundle()), 0.0)


def test_its_mean_over_what_a_student_draws_is_the_divergence() -> None:
    draw, log_q, log_b = np.random.default_rng(0), np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])
    tokens, n = draw.choice(3, 40_000, p=np.exp(log_q)), 40_000
    drawn = {
        "tokens": tokens.astype(np.int32),
        "lengths": np.asarray([n], np.int32),
        "loss_mask": np.ones(n, np.uint8),
        "written": np.ones(1, np.uint8),
        "finished": np.ones(1, np.uint8),
        "behaviour": log_q[tokens].astype(np.float32),
        "b/logprob": log_b[tokens].astype(np.float32),
        "rollout/left_out": np.zeros(1, np.float32),
        "rollout/seconds": np.zeros(1, np.float32),
        "step": np.asarray([1], np.int64),
        "written_by": np.zeros(1, np.int64),
    }
    exact = float((np.exp(log_q) * (log_q - log_b)).sum())
    assert rollout_metrics(rollout_sums(drawn, "b"), 0.0)["rollout/kl_to_base"] == pytest.approx(exact, abs=0.03)


def test_verdicts_in_numbers() -> None:
    """Three groups: one of the data's row and a text without a verdict, one of equal rewards, one of different ones."""
    written, judged = [0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]
    columns = {
        "tokens": np.arange(7, dtype=np.int32),
        "lengths": np.ones(7, np.int32),
        "loss_mask": np.ones(7, np.uint8),
        "row_id": np.asarray([1, 1, 2, 2, 3, 3, 3], np.int64),
        "written": np.asarray(written, np.uint8),
        "finished": np.ones(7, np.uint8),
        "behaviour": np.zeros(7, np.float32),
        "reward": np.asarray([0, 0, 1, 1, 0, 0.5, 1], np.float32),
        "judged": np.asarray(judged, np.uint8),
        "judge/failed": np.ones(1, np.int64),
        "judge/unjudgeable": np.zeros(1, np.int64),
        "judge/seconds": np.asarray([0.5], np.float32),
        "rollout/left_out": np.zeros(1, np.float32),
        "rollout/seconds": np.zeros(1, np.float32),
        "step": np.asarray([1], np.int64),
        "written_by": np.asarray(written, np.int64) - 1,
    }
    found = rollout_metrics(rollout_sums(columns), 0.0)
    assert found["rollout/judged"] == pytest.approx(5 / 6) and found["rollout/reward"] == pytest.approx(3.5 / 5)
    assert found["rollout/passed"] == pytest.approx(4 / 5) and found["rollout/equal_rewards"] == 0.5
    assert (found["rollout/judge_failed"], found["rollout/unjudgeable"], found["judge_seconds"]) == (1, 0, 0.5)
    nobody = rollout_metrics(rollout_sums(columns | {"judged": np.zeros(7, np.uint8)}), 0.0)
    assert nobody["rollout/judged"] == 0 and not {"rollout/reward", "rollout/passed", "rollout/equal_rewards"} & set(nobody)


def test_what_stages_count_is_logged_beside_what_texts_were_like() -> None:
    control = {name: np.asarray([1], np.int64) for name in ("step", "rows_total")}
    counted = {"count/repair/failed": np.asarray([2], np.float32), "count/a": np.asarray([5], np.float32)}
    found = stream_metrics([{**bundle(), **control, **counted, "row_id": np.asarray([4, 4, 6])}], Strategy({}, ()), 0.0, 0.5)
    assert (found["repair/failed"], found["a"], found["rollout/length"]) == (2, 5, 5)
    assert (found["tokens"], found["row_id_sum"], found["stream_wait_seconds"]) == (15, 14, 0.5)


def test_a_bundle_without_rows_has_zeros() -> None:
    empty = {name: values[:0] if name not in BUNDLES else values for name, values in bundle().items()}
    found = rollout_metrics(rollout_sums(empty), oldest_steps(empty))
    assert found["rollout/left_out"] == 3 and not {"rollout/length", "rollout/share"} & set(found)


def test_texts_of_a_snapshot_are_as_old_as_the_run_and_not_recalled() -> None:
    snapshot = {name: values for name, values in bundle().items() if name != "policy_version"} | {"written_by": np.asarray([-1, 0, 0])}
    found = rollout_metrics(rollout_sums(snapshot), oldest_steps(snapshot))
    assert (found["age_steps"], found["rollout/recalled"]) == (8, 0)


def test_texts_that_a_repair_replaced_are_told_of() -> None:
    """The student's texts, and none of the rows that are learnt in their place: behind them nothing is known of a writer."""
    own, control = bundle(), {name: np.asarray([9], np.int64) for name in ("step", "rows_total")}
    kept = {f"attempt/{name}": values for name, values in own.items() if name not in BUNDLES}
    lessons = {"tokens": np.asarray([9, 1], np.int32), "lengths": np.asarray([2], np.int32), "loss_mask": np.asarray([0, 1], np.uint8)}
    whole = {**{name: own[name] for name in BUNDLES}, **control, **kept, **lessons, "row_id": np.asarray([4])}
    found, expected = stream_metrics([whole], Strategy({}, ()), 0.0, 0.5), rollout_metrics(rollout_sums(own), oldest_steps(own))
    assert found["tokens"] == 2 and {name: found[name] for name in expected} == expected


def test_a_step_without_lessons_says_what_became_of_its_rows() -> None:
    idle = {"loss": 0.0, "loss/ce": 0.0, "tokens_per_second": 0.0, "micro_batches": 0.0}
    counts = {"repair/attempts": 8.0, "repair/passed": 8.0, "repair/failed": 0.0, "repair/seconds": 0.5, "rollout/left_out": 1.0}
    said = step_words(idle | counts, fates(Personalised().build()))
    assert said == "nothing to learn (rollout/left_out 1, repair/attempts 8, repair/passed 8)"
    assert step_words(idle, ()) == "nothing to learn (no token has a weight)"
    assert step_words(idle | {"micro_batches": 1.0, "tokens_per_second": 2000.0}, ()) == "loss 0.000 (ce 0.000) 2,000 tokens/s"
    assert "left_out/self" in fates(OPSD().build())
