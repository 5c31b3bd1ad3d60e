"""What the student got wrong is mended, judged again, and learnt from; what it got right is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from strategies.core import Columns, Endpoint, Sampling, ScoreRequest
from strategies.personalised import Personalised
from strategies.stages.repair import Lessons, Repair, Variant
from strategies.stages.rollout import Rollout
from tests.strategies.test_rollout import Counting, bundle, rows

STOP, FEEDBACK = 0, (50, 51)
STAGE = Repair("teacher", Sampling(max_new_tokens=4, seed=7, stop=(STOP,)), feedback=FEEDBACK, longest_tokens=12)


class Mending(Counting):
    """Answers every question with two tokens, 60 and 61."""

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        self.asked.append((columns, sampling))
        n = len(columns["lengths"])
        return {
            "tokens": np.tile(np.asarray([60, 61], np.int32), n),
            "lengths": np.full(n, 2, np.int32),
            "row_id": columns["row_id"],
            "sample": np.zeros(n, np.int32),
            "finished": np.ones(n, np.uint8),
            "logprobs": np.full(2 * n, np.nan, np.float32),
            "cost": np.asarray([0.25], np.float32),
        }


def attempts(reward: list[float], judged: list[int], step: int = 3) -> Columns:
    """Three attempts of at most three tokens, the first of which ended by itself, and what a verifier said of them."""
    out = Rollout(Sampling(max_new_tokens=3, seed=4, stop=(STOP,)), longest_tokens=8)(bundle(step), Counting())
    if step:
        out["tokens"][5] = STOP
    return {**out, "reward": np.asarray(reward, np.float32), "judged": np.asarray(judged, np.uint8)}


def counts(columns: Columns) -> dict[str, float]:
    return {name.removeprefix("count/repair/"): float(values[0]) for name, values in columns.items() if name.startswith("count/")}


def test_the_teacher_reads_a_wrong_attempt_and_its_text_takes_the_attempts_place() -> None:
    author = Mending()
    out = STAGE(attempts([0.2, 1, 0], [1, 1, 1]), author)
    ((question, sampling),) = author.asked
    assert rows(question) == [[5, 6, 7, 120, 120, *FEEDBACK], [9, 10, 122, 122, 122, *FEEDBACK]]
    assert question["row_id"].tolist() == [20, 22] and question["max_new_tokens"].tolist() == [4, 4]
    assert sampling.seed != STAGE.sampling.seed and sampling.stop == (STOP,)
    assert rows(out) == [[5, 6, 7, 60, 61], [9, 10, 60, 61]] and out["loss_mask"].tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert np.split(out["reference"], np.cumsum(out["reference_lengths"])[:-1])[0].tolist() == [1, 2]
    assert out["written"].all() and not out["behaviour"].any() and len(out["behaviour"]) == 4
    assert out["changed"].tolist() == [1, 1] and "reward" not in out and STAGE.adds <= set(out)


def test_what_the_student_wrote_stays_beside_what_is_learnt_in_its_place() -> None:
    before = attempts([0.2, 1, 0], [1, 1, 1])
    judged = {"judge/failed": np.asarray([1], np.int64)}
    out = Lessons("combine")({**STAGE({**before, **judged}, Mending()), "reward": np.ones(2), "judged": np.ones(2), **judged}, None)
    kept = {name.removeprefix("attempt/"): values for name, values in out.items() if name.startswith("attempt/")}
    assert {"tokens", "lengths", "loss_mask", "behaviour", "written", "written_by", "finished", "reward", "judged"} < set(kept)
    assert all(values is before[name] for name, values in kept.items() if name in before) and kept["judge/failed"].tolist() == [1]


def test_attempts_are_counted_and_unknown_is_not_wrong() -> None:
    found = counts(STAGE(attempts([0, 0.5, 0], [1, 1, 0]), Mending()))
    found.pop("seconds")
    assert found == {"attempts": 3, "passed": 1, "unjudged": 1, "failed": 1, "left_out": 0, "cost": 0.25}


def test_a_student_without_faults_leaves_an_empty_bundle_and_nobody_is_asked() -> None:
    author = Mending()
    out = STAGE(attempts([1, 1, 1], [1, 1, 1]), author)
    nothing = Lessons("combine")({**out, "reward": np.zeros(0, np.float32), "judged": np.zeros(0, np.uint8)}, None)
    assert not author.asked and len(out["tokens"]) == len(out["lengths"]) == len(out["lead"]) == 0
    assert nothing["tokens"].dtype == np.int32 and len(nothing["lengths"]) == 0
    assert counts(nothing)["failed"] == counts(nothing)["repaired"] == 0


def test_an_attempt_that_leaves_no_room_is_left_out() -> None:
    author = Mending()
    out = replace(STAGE, longest_tokens=7)(attempts([0, 0, 0], [1, 1, 1]), author)
    assert counts(out)["left_out"] == 3 and not author.asked
    out = replace(STAGE, longest_tokens=8)(attempts([0, 0, 0], [1, 1, 1]), author)
    assert author.asked[0][0]["max_new_tokens"].tolist() == [1, 1] and counts(out)["left_out"] == 1


@pytest.mark.parametrize(
    ("variant", "learnt"),
    [
        ("direct", [[5, 6, 7, 60, 61]]),
        ("refine", [[5, 6, 7, 120, 120, 50, 51, 60, 61]]),
        ("combine", [[5, 6, 7, 60, 61], [5, 6, 7, 120, 120, 50, 51, 60, 61]]),
    ],
)
def test_a_right_repair_is_learnt_and_the_attempt_never_is(variant: Variant, learnt: list[list[int]]) -> None:
    mended = STAGE(attempts([0, 0, 0], [1, 1, 1]), Mending())
    judged = {**mended, "reward": np.asarray([1, 0, 1], np.float32), "judged": np.asarray([1, 1, 0], np.uint8)}
    out = Lessons(variant)(judged, None)
    assert rows(out) == learnt and out["row_id"].tolist() == [20] * len(learnt)
    assert out["tokens"][out["loss_mask"].astype(bool)].tolist() == [60, 61] * len(learnt)
    assert counts(out)["repaired"] == 1 and not {"written", "reward", "lead"} & set(out)


def test_a_repair_that_ignores_the_attempt_can_be_dropped() -> None:
    mended = STAGE(attempts([0, 0, 0], [1, 1, 1]), Mending())
    mended |= {"reward": np.ones(3, np.float32), "judged": np.ones(3, np.uint8), "changed": np.asarray([0.5, 0.91, 0.9], np.float32)}
    out = Lessons("direct", most_changed=0.9)(mended, None)
    assert out["row_id"].tolist() == [20, 22] and counts(out)["changed"] == pytest.approx(1.4)


def test_how_much_changed_is_a_share_of_both_texts() -> None:
    given = attempts([0, 1, 1], [1, 1, 1])
    given["tokens"][3:6] = 60, 5, STOP
    assert STAGE(given, Mending())["changed"].tolist() == [pytest.approx(1 - 2 / 5)]


def test_rows_that_nobody_wrote_stay() -> None:
    given = attempts([0, 0, 0], [0, 0, 0], step=0)
    out = STAGE(given, Mending())
    kept = Lessons("combine")({**out, "reward": np.zeros(3, np.float32), "judged": np.zeros(3, np.uint8)}, None)
    assert all(np.array_equal(kept[name], given[name]) for name in ("tokens", "lengths", "loss_mask", "row_id"))
    assert counts(kept)["attempts"] == 0


@pytest.mark.parametrize("variant", ["direct", "refine", "combine"])
def test_estimates_know_the_longest_lesson(variant: Variant) -> None:
    lengths = np.asarray([6, 6, 5])  # of the attempts
    bound = Lessons(variant).longest_rows(STAGE.longest_rows(lengths))
    mended = STAGE(attempts([0, 0, 0], [1, 1, 1]), Mending())
    out = Lessons(variant)({**mended, "reward": np.ones(3, np.float32), "judged": np.ones(3, np.uint8)}, None)
    assert len(bound) == len(out["lengths"]) and (bound >= out["lengths"]).all() and bound.max() <= 12


def test_only_an_author_can_repair() -> None:
    class Scorer:
        def score(self, columns: Columns, request: ScoreRequest) -> Columns:
            return {}

    silent: Endpoint = Scorer()
    with pytest.raises(ValueError, match="does not"):
        STAGE(attempts([0, 0, 0], [1, 1, 1]), silent)


def test_attempts_are_judged_before_and_after_they_are_mended() -> None:
    strategy = Personalised(variant="refine").build()
    assert [s.endpoint for s in strategy.stages] == ["student", "verifier", "teacher", "verifier", None]
    assert not strategy.signals and strategy.rows_together == 1
