"""Rewards of written rows, their advantages within a group, and pacing; against float64 references written from the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.core import Columns, Stage, Verifier
from strategies.stages.judge import GroupAdvantage, Reward
from strategies.stages.pacing import Control, PassRateWeight, paced_weight

CONTROLS: tuple[Control, ...] = ("none", "uniform", "random", "random")
STAGES: list[Stage] = [GroupAdvantage(), PassRateWeight(("policy",))]


@dataclass
class Lengths:
    """Rewards a row by its loss tokens over 10, and remembers what it was asked; a row with no reference is not judged."""

    asked: list[Columns] = field(default_factory=list)

    def judge(self, columns: Columns) -> Columns:
        self.asked.append(columns)
        ends = np.cumsum(columns["lengths"])
        sizes = [int(columns["loss_mask"][e - n : e].sum()) for e, n in zip(ends, columns["lengths"], strict=True)]
        judged = (columns["reference_lengths"] > 0).astype(np.uint8)
        return {
            "reward": np.asarray(sizes, dtype=np.float32) / 10 * judged,
            "judged": judged,
            "failed": np.asarray([3], dtype=np.int64),
            "unjudgeable": np.asarray([int((1 - judged).sum())], dtype=np.int64),
        }


def rows(sizes: list[tuple[int, int]], **columns: list[float]) -> Columns:
    """A bundle of rows with so many tokens, of which the last so many are loss tokens."""
    mask = [int(i >= n - loss) for n, loss in sizes for i in range(n)]
    dtypes = {"row_id": np.int64, "reward": np.float32, "reference": np.int32, "reference_lengths": np.int32}
    return {
        "tokens": np.arange(len(mask), dtype=np.int32),
        "lengths": np.asarray([n for n, _ in sizes], dtype=np.int32),
        "loss_mask": np.asarray(mask, dtype=np.uint8),
        **{name: np.asarray(values, dtype=dtypes.get(name, np.uint8)) for name, values in columns.items()},
    }


def test_only_written_rows_are_judged() -> None:
    verifier, stage = Lengths(), Reward("checker")
    columns = rows([(3, 2), (4, 1), (5, 3), (2, 1)], written=[1, 0, 1, 1], reference=[7, 8, 8, 9], reference_lengths=[1, 2, 1, 0])
    found = stage(columns, verifier)
    (asked,) = verifier.asked
    assert set(asked) == {"tokens", "lengths", "loss_mask", "reference", "reference_lengths"}
    assert asked["tokens"].tolist() == [0, 1, 2, 7, 8, 9, 10, 11, 12, 13] and asked["loss_mask"].tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 1]
    assert [asked[n].tolist() for n in ("lengths", "reference", "reference_lengths")] == [[3, 5, 2], [7, 9], [1, 1, 0]]
    np.testing.assert_array_equal(found["reward"], np.asarray([0.2, 0, 0.3, 0], dtype=np.float32))
    assert found["judged"].tolist() == [1, 0, 1, 0]
    assert (found["judge/failed"].tolist(), found["judge/unjudgeable"].tolist()) == ([3], [1])
    assert found["judge/seconds"].shape == (1,) and found["judge/seconds"].dtype == np.float32
    assert found["reward"].dtype == np.float32 and found["judged"].dtype == np.uint8
    assert set(found) - set(columns) == stage.adds and stage.needs <= set(columns)


def test_a_bundle_without_written_rows_has_no_rewards() -> None:
    columns = rows([(3, 2)], written=[0], reference=[7], reference_lengths=[1])
    found = Reward("checker")(columns, Lengths())
    assert (found["reward"].tolist(), found["judged"].tolist()) == ([0], [0])


def test_an_endpoint_that_does_not_judge_is_refused() -> None:
    assert isinstance(Lengths(), Verifier)
    with pytest.raises(ValueError, match="'teacher' does not"):
        Reward("teacher")({}, None)


def test_verdicts_must_be_as_many_as_written_rows() -> None:
    @dataclass
    class Short:
        def judge(self, columns: Columns) -> Columns:
            return Lengths().judge(columns) | {"reward": np.zeros(1, dtype=np.float32)}

    with pytest.raises(ValueError, match="one for each of 2 written rows"):
        Reward("checker")(rows([(2, 1), (2, 1)], written=[1, 1], reference=[1, 1], reference_lengths=[1, 1]), Short())


def reference_advantages(rewards: list[float], scale: bool) -> list[float]:
    """(R_i - mean) / (std + 1e-6) of the population, term by term."""
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / (std + 1e-6 if scale else 1.0) for r in rewards]


@pytest.mark.parametrize("scale", [True, False])
def test_an_advantage_is_what_the_formula_says(scale: bool) -> None:
    columns = rows(
        [(4, 2), (3, 1), (5, 4), (3, 0), (4, 3), (6, 2), (3, 1), (2, 1)],
        row_id=[5, 5, 5, 5, 9, 9, 5, 5],
        reward=[0.0, 1.0, 0.25, 1.0, 1.0, 0.1, 0.75, 0.5],
        written=[1, 1, 1, 1, 1, 1, 1, 1],
        judged=[1] * 8,
    )
    stage = GroupAdvantage(scale)
    found = stage(columns, None)
    groups = [[0.0, 1.0, 0.25, 1.0], [1.0, float(np.float32(0.1))], [0.75, 0.5]]
    wanted = [a for group in groups for a in reference_advantages(group, scale)]
    per_token = [a for a, loss in zip(wanted, [2, 1, 4, 0, 3, 2, 1, 1], strict=True) for _ in range(loss)]
    assert found["advantage"].dtype == found["group_pass_rate"].dtype == np.float32
    np.testing.assert_allclose(found["advantage"], per_token, rtol=1e-6)
    np.testing.assert_array_equal(found["group_pass_rate"], [0.5] * 4 + [0.5] * 2 + [1.0] * 2)
    rewards = [0.0] * 2 + [1.0] + [0.25] * 4 + [1.0] * 3 + [np.float32(0.1)] * 2 + [0.75, 0.5]
    np.testing.assert_array_equal(found["token_reward"], np.asarray(rewards, dtype=np.float32))
    assert found["group_failed"].dtype == np.float32 and not found["group_failed"].any()
    assert set(found) - set(columns) == stage.adds


def test_rows_without_a_verdict_and_rows_of_the_data_do_not_count() -> None:
    columns = rows(
        [(2, 1)] * 8,
        row_id=[1, 1, 1, 1, 2, 2, 3, 3],
        reward=[1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0],
        written=[1, 1, 1, 0, 0, 0, 1, 1],
        judged=[1, 1, 0, 1, 1, 1, 0, 1],
    )
    found = GroupAdvantage()(columns, None)
    one, other = reference_advantages([1.0, 0.0], True)
    np.testing.assert_allclose(found["advantage"], [one, other, 0, 0, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(found["group_pass_rate"], np.asarray([0.5] * 4 + [0, 0, 1, 1], dtype=np.float32))
    assert found["token_reward"].tolist() == [1, 0, 1, 1, 1, 1, 1, 1], "nobody knows the others to be wrong"


def test_a_group_failed_where_none_of_its_judged_texts_is_right() -> None:
    columns = rows(
        [(3, 2)] * 6,
        row_id=[1, 1, 2, 2, 3, 3],
        reward=[0.4, 0.0, 0.0, 0.5, 0.0, 0.0],
        written=[1] * 6,
        judged=[1, 1, 1, 1, 0, 0],
    )
    assert GroupAdvantage()(columns, None)["group_failed"].tolist() == [1] * 4 + [0] * 8


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_teach_exactly_nothing(reward: float, scale: bool) -> None:
    columns = rows([(2, 1)] * 7, row_id=[1] * 7, reward=[reward] * 7, written=[1] * 7, judged=[1] * 7)
    assert GroupAdvantage(scale)(columns, None)["advantage"].tolist() == [0.0] * 7


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: type(s).__name__)
def test_a_bundle_without_rows_stays_one(stage: Stage) -> None:
    found = stage(rows([], row_id=[], reward=[], written=[], judged=[]), None)
    assert stage.endpoint is None and all(len(found[name]) == 0 for name in stage.adds)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 1.0), (0.5, 3.0)])
def test_pacing_is_largest_where_the_rate_is_a_over_a_plus_b(a: float, b: float) -> None:
    samples = 100_000
    weights = paced_weight(np.arange(samples + 1.0), samples, a, b)
    assert (np.argmax(weights) + 0.5) / (samples + 1) == pytest.approx(a / (a + b), abs=1e-5)


@given(st.integers(0, 64), st.integers(0, 64), st.floats(0.1, 4), st.floats(0.1, 4))
def test_pacing_is_never_0_and_what_the_formula_says(passes: int, failures: int, a: float, b: float) -> None:
    rate = (passes + 0.5) / (passes + failures + 1)
    weight = float(paced_weight(passes, passes + failures, a, b))
    assert weight > 0 and weight == pytest.approx(math.exp(a * math.log(rate) + b * math.log(1 - rate)), rel=1e-12)


def test_a_prompt_that_is_sometimes_solved_weighs_most() -> None:
    columns = rows(
        [(3, 2), (2, 1), (3, 1), (2, 1), (3, 2), (2, 1), (2, 1)],
        row_id=[1, 1, 2, 2, 3, 3, 5],
        reward=[1.0, 0.0, 1.0, 0.5, 0.0, 1.0, 1.0],
        written=[1, 1, 1, 1, 1, 0, 1],
        judged=[1, 1, 1, 1, 1, 1, 0],
    )
    given_weights = np.asarray([2, 1, 1, 0, 1, 1, 1, 1, 1], dtype=np.float32)
    stage = PassRateWeight(("policy", "distil"))
    found = stage({**columns, "weights/distil": given_weights}, None)
    half, both, none = 1.0, 4 * (2.5 / 3) * (0.5 / 3), 4 * (0.5 / 2) * (1.5 / 2)
    wanted = [half] * 3 + [both] * 2 + [none] * 2 + [1.0] + [1.0]
    np.testing.assert_allclose(found["weights/policy"], wanted, rtol=1e-6)
    np.testing.assert_allclose(found["weights/distil"], given_weights * wanted, rtol=1e-6)
    assert found["weights/policy"].dtype == found["weights/distil"].dtype == np.float32
    assert stage.adds == {"weights/policy", "weights/distil"} and stage.needs <= set(columns)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.floats(0.1, 4), st.floats(0.1, 4))
def test_a_pace_lies_above_0_and_at_most_at_1(right: list[bool], a: float, b: float) -> None:
    n = len(right)
    columns = rows([(2, 1)] * n, row_id=[1] * n, reward=[float(r) for r in right], written=[1] * n, judged=[1] * n)
    pace = PassRateWeight(("policy",), a, b)(columns, None)["weights/policy"]
    assert pace.min() > 0 and pace.max() <= 1 and len(set(pace.tolist())) == 1


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_exponents_that_hold_nothing_back_are_refused(a: float, b: float) -> None:
    with pytest.raises(ValueError, match="expected both above 0"):
        PassRateWeight(("policy",), a, b)


def test_controls_keep_the_sum_of_weights_and_take_its_meaning() -> None:
    right = [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    columns = rows([(2, 1)] * 8, row_id=[3, 3, 1, 1, 4, 4, 2, 2], reward=right, written=[1] * 8, judged=[1] * 8)
    paced, uniform, random, again = (
        PassRateWeight(("policy",), control=control)(columns, None)["weights/policy"].reshape(4, 2) for control in CONTROLS
    )
    assert len(set(paced[:, 0].tolist())) == 2
    np.testing.assert_allclose(uniform, paced.mean(), rtol=1e-6)
    np.testing.assert_allclose(np.sort(random[:, 0]), np.sort(paced[:, 0]), rtol=1e-6)
    np.testing.assert_array_equal(random, again)
    lots = {
        tuple(PassRateWeight(("policy",), control="random")({**columns, "row_id": columns["row_id"] + n}, None)["weights/policy"].tolist())
        for n in range(20)
    }
    assert len(lots) > 2


def test_texts_of_one_prompt_that_were_recalled_side_by_side_are_two_groups() -> None:
    columns = rows([(2, 1)] * 4, row_id=[1] * 4, reward=[1.0, 0.0, 0.0, 0.0], written=[1] * 4, judged=[1] * 4, sample=[0, 1, 0, 1])
    assert GroupAdvantage()(columns, None)["group_failed"].tolist() == [0, 0, 1, 1]
