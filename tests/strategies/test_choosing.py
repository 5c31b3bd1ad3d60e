"""Teachers chosen by the student's gains: the better one is found, equal ones are not told apart, and everybody draws the same."""

from __future__ import annotations

import numpy as np
import pytest

from strategies.choosing import Chosen, ProgressSetting
from strategies.control import State
from strategies.multi_teacher import MultiTeacher

NAMES = ("poor", "good")


def controllers(**setting: float) -> dict[str, Chosen]:
    return {name: Chosen(name, NAMES, ProgressSetting.model_validate(setting)) for name in NAMES}


def lived(gains: dict[str, float], rounds: int, noise: float = 0.0, **setting: float) -> tuple[State, list[str]]:
    """What the controllers know after so many evaluations of a student that gains so much under each, and who taught."""
    every = controllers(**setting)
    states, loss, taught, random = {n: c.begin() for n, c in every.items()}, 100.0, [], np.random.default_rng(0)
    for _ in range(rounds):
        (chosen,) = [n for n, c in every.items() if c.value(states[n])]
        taught.append(chosen)
        loss -= gains[chosen] + noise * random.standard_normal()
        states = {n: c.after_evaluation(states[n], {"eval/cross_entropy": loss}) for n, c in every.items()}
    assert states["poor"] == states["good"]
    return states["good"], taught


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_teacher_under_whom_the_student_gains_more_is_preferred_whatever_the_size_of_gains(scale: float) -> None:
    state, taught = lived({"good": 0.3 * scale, "poor": 0.1 * scale}, 80, noise=0.05 * scale)
    assert controllers()["good"].policy(state)["good"] > 0.9
    assert taught[-40:].count("good") > 30 and 5 < taught[:20].count("good") < 20


def test_a_surprise_moves_preferences_by_reinforce() -> None:
    """With three teachers, of one interval: rate times the clipped advantage times (chosen - policy), for all of them."""
    names = ("a", "b", "c")
    controller = Chosen("a", names, ProgressSetting(rate=0.5, memory=0.75))
    before = {"preference/a": 0.2, "preference/b": -0.1, "preference/c": 0.0, "chosen": 1.0, "round": 7.0, "loss": 3.0}
    after = controller.after_evaluation({**before, "gain": 0.1, "size": 0.4}, {"eval/cross_entropy": 2.4})
    size = 0.75 * 0.4 + 0.25 * 0.5  # the gain was 0.6, 0.5 more than expected
    policy = np.exp([0.2, -0.1, 0.0]) / np.exp([0.2, -0.1, 0.0]).sum()
    wanted = np.asarray([0.2, -0.1, 0.0]) + 0.5 * (0.5 / size) * (np.asarray([0.0, 1.0, 0.0]) - policy)
    np.testing.assert_allclose([after[f"preference/{n}"] for n in names], wanted, rtol=1e-12)
    assert (after["gain"], after["size"], after["loss"]) == pytest.approx((0.75 * 0.1 + 0.25 * 0.6, size, 2.4))


def test_equal_gains_move_no_preference() -> None:
    state, _ = lived({"good": 0.25, "poor": 0.25}, 40)
    assert state["preference/good"] == state["preference/poor"] == 0.0


def test_exploring_alone_is_even() -> None:
    _, taught = lived({"good": 1.0, "poor": 0.0}, 400, explore=1.0)
    assert 160 < taught.count("good") < 240


def test_a_recipe_has_a_controller_for_each_teacher_and_asks_the_chosen_one_alone() -> None:
    strategy = MultiTeacher.model_validate({"teachers": list(NAMES), "gate": {"by": "progress"}}).build()
    assert set(strategy.controllers) == {"choice/poor", "choice/good"}
    asks = {s.endpoint: s.needs for s in strategy.stages if s.endpoint}
    assert all(f"control/choice/{name}" in needs for name, needs in asks.items())
