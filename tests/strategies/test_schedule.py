"""Schedules against their formulas, at their ends, and under any parameters."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as some
from pydantic import TypeAdapter, ValidationError

from strategies.core import Progress
from strategies.schedule import Cosine, LearningRate, PositiveSchedule, Ramp, ScheduleConfig, Steps, constant, schedule, values_of

READ: TypeAdapter[ScheduleConfig] = TypeAdapter(ScheduleConfig)
READ_POSITIVE: TypeAdapter[ScheduleConfig] = TypeAdapter(PositiveSchedule)


def at(step: int, steps: int = 100) -> Progress:
    return Progress(step=step, steps=steps)


def test_progress_is_the_finished_share_of_the_run() -> None:
    assert (at(0).fraction, at(25).fraction, at(100).fraction, Progress(0, 0).fraction) == (0.0, 0.25, 1.0, 0.0)


def test_a_number_in_a_recipe_is_constant() -> None:
    weight = schedule(READ.validate_python(0.9))
    assert {weight(at(s)) for s in (0, 1, 50, 100)} == {0.9}


def test_a_ramp_is_a_straight_line_over_the_whole_run_when_no_length_is_given() -> None:
    ramp = Ramp(ramp=(0.1, 0.9))
    assert [ramp(at(s)) for s in (0, 25, 50, 100)] == pytest.approx([0.1, 0.3, 0.5, 0.9])


def test_a_ramp_waits_for_its_first_step_and_stays_at_its_end() -> None:
    ramp = Ramp(ramp=(2.0, 0.0), over_steps=10, from_step=20)
    assert [ramp(at(s)) for s in (0, 20, 25, 30, 99)] == pytest.approx([2.0, 2.0, 1.0, 0.0, 0.0])


def test_a_ramp_that_starts_late_still_ends_with_the_run() -> None:
    assert Ramp(ramp=(0.0, 1.0), from_step=60)(at(80)) == pytest.approx(0.5)


def test_a_cosine_is_half_a_period() -> None:
    cosine = Cosine(cosine=(1.0, 0.2))
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * s / 100)) / 2 for s in (0, 10, 50, 90, 100)]
    assert [cosine(at(s)) for s in (0, 10, 50, 90, 100)] == pytest.approx(expected)
    assert (cosine(at(0)), cosine(at(100))) == pytest.approx((1.0, 0.2))


def test_steps_change_exactly_where_they_say() -> None:
    steps = Steps(steps=((0, 1.0), (100, 0.5), (150, 0.0)))
    assert [steps(at(s, 200)) for s in (0, 99, 100, 149, 150, 199)] == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("points", [[], [[1, 1.0]], [[0, 1.0], [0, 2.0]], [[0, 1.0], [9, 2.0], [5, 3.0]]])
def test_steps_that_do_not_rise_from_zero_are_refused(points: list[list[float]]) -> None:
    with pytest.raises(ValidationError, match="rising steps starting at 0"):
        Steps.model_validate({"steps": points})


@pytest.mark.parametrize(
    ("written", "kind"),
    [({"ramp": [0.1, 0.9]}, Ramp), ({"cosine": [1, 0], "over_steps": 5}, Cosine), ({"steps": [[0, 1], [5, 0]]}, Steps), (2, float)],
)
def test_a_recipe_may_write_any_schedule_where_a_scalar_stands(written: object, kind: type) -> None:
    assert isinstance(READ.validate_python(written), kind)


def test_an_unknown_key_of_a_schedule_is_an_error() -> None:
    with pytest.raises(ValidationError):
        READ.validate_python({"ramp": [0, 1], "over_stesp": 5})


@pytest.mark.parametrize("written", [0.0, -1.0, {"ramp": [1.0, 0.0]}, {"cosine": [-1.0, 1.0]}, {"steps": [[0, 1.0], [5, 0.0]]}])
def test_a_temperature_that_reaches_zero_is_refused(written: object) -> None:
    with pytest.raises(ValidationError, match="above 0 throughout"):
        READ_POSITIVE.validate_python(written)


values = some.floats(-5, 5)
counts = some.integers(0, 300)


@given(values, values, counts, some.integers(1, 300), some.integers(1, 300), counts)
def test_a_schedule_never_leaves_the_values_it_declares(start: float, end: float, begin: int, over: int, steps: int, step: int) -> None:
    ramp = Ramp(ramp=(start, end), over_steps=over, from_step=begin)
    cosine = Cosine(cosine=(start, end), over_steps=over, from_step=begin)
    stairs = Steps(steps=((0, start), (over, end)))
    for shape in (ramp, cosine, stairs):
        low, high = min(values_of(shape)), max(values_of(shape))
        assert low - 1e-9 <= shape(at(step, steps)) <= high + 1e-9


def test_warm_up_rises_to_the_peak_and_the_first_step_already_learns() -> None:
    rate = LearningRate(kind="constant", warmup_steps=4)
    assert [rate(at(s)) for s in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_learning_rate_falls_from_the_peak_to_its_final_share_after_the_last_step(kind: str) -> None:
    rate = LearningRate.model_validate({"kind": kind, "warmup_steps": 10, "final": 0.1})
    assert (rate(at(10)), rate(at(55)), rate(at(100))) == pytest.approx((1.0, 0.55, 0.1))
    falling = [rate(at(s)) for s in range(10, 101)]
    assert all(a > b for a, b in pairwise(falling))


@given(counts, some.integers(1, 50), counts, some.floats(0, 1))
def test_a_learning_rate_is_a_share_of_the_peak_for_any_run(warmup: int, steps: int, step: int, final: float) -> None:
    for kind in ("cosine", "linear", "constant"):
        share = LearningRate.model_validate({"kind": kind, "warmup_steps": warmup, "final": final})(at(min(step, steps), steps))
        assert 0.0 <= share <= 1.0


def test_schedules_travel_between_processes() -> None:
    for shape in (constant(0.5), Ramp(ramp=(0, 1)), Cosine(cosine=(1, 0)), Steps(steps=((0, 1.0),)), LearningRate()):
        assert pickle.loads(pickle.dumps(shape))(at(30)) == shape(at(30))
