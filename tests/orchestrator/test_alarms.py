"""Alarms on drawn curves: they rise on what goes wrong, and are silent on noise and on learning that looks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from orchestrator.alarms import Alarms
from orchestrator.history import History, smaller_is_better

STEPS, EVERY = 300, 15
Curve = Callable[[float], float]
"""Value at a share of the run, 0 to 1."""


def risen(alarms: Alarms, noise: float, seed: int, **curves: Curve) -> dict[str, int]:
    """Steps at which alarms first rise, on curves of step metrics (`a__b` for `a/b`) with noise of that relative size; those of
    `eval/` are there every `EVERY` steps, with a tenth of it."""
    draw, history, found = np.random.default_rng(seed), alarms.history(), dict[str, int]()
    for step in range(1, STEPS + 1):
        values = {}
        for name, curve in curves.items():
            metric = name.replace("__", "/")
            if not metric.startswith("eval/"):
                values[metric] = curve(step / STEPS) * (1 + noise * draw.normal())
            elif step % EVERY == 0:
                values[metric] = curve(step / STEPS) * (1 + 0.1 * noise * draw.normal())
        history.add(step, values)
        found = dict.fromkeys(alarms.judge(history), step) | found
    return found


def moved(start: float, end: float) -> Curve:
    """Stays for a third of the run, and then goes from `start` to `end` in the second third."""
    return lambda x: start + (end - start) * min(1.0, max(0.0, 3 * x - 1))


def at(value: float) -> Curve:
    return lambda x: value


HEALTHY: dict[str, Curve] = {
    "rollout__surprise": at(0.4),
    "rollout__length": at(120),
    "rollout__finished": at(0.8),
    "rollout__repeated": at(0.2),
    "rollout__kl_to_base": at(0.1),
    "rollout__reward": at(0.5),
    "eval__cross_entropy": at(2.0),
    "eval__forward_kl": at(0.2),
}
GOLDEN = Alarms(golden="eval/cross_entropy")


@pytest.mark.parametrize("noise", [0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_noise_raises_nothing(noise: float, seed: int) -> None:
    assert risen(GOLDEN, noise, seed, **HEALTHY) == {}


COLLAPSES: list[tuple[str, dict[str, Curve]]] = [
    ("entropy_collapse", {"rollout__surprise": moved(0.4, 0.03)}),
    ("entropy_collapse", {"rollout__surprise": at(0.005)}),
    ("length_collapse", {"rollout__length": moved(120, 8)}),
    ("length_collapse", {"rollout__length": moved(120, 1.2), "rollout__finished": at(0.1)}),
    ("length_explosion", {"rollout__finished": moved(0.8, 0.1)}),
    ("length_explosion", {"rollout__length": moved(120, 700)}),
    ("repetition", {"rollout__repeated": moved(0.2, 0.9)}),
    ("base_kl", {"rollout__kl_to_base": moved(0.05, 1.0)}),
    ("golden_versus_proxy", {"rollout__reward": moved(0.3, 0.9), "eval__cross_entropy": moved(2.0, 2.3)}),
    ("golden_versus_proxy", {"eval__forward_kl": moved(0.4, 0.2), "eval__cross_entropy": moved(2.0, 2.3)}),
]


@pytest.mark.parametrize(("name", "curves"), COLLAPSES)
def test_what_goes_wrong_raises_its_own_alarm_and_no_other(name: str, curves: dict[str, Curve]) -> None:
    for seed in range(2):
        found = risen(GOLDEN, 0.1, seed, **HEALTHY | curves)
        assert set(found) == {name} and found[name] <= STEPS


LEARNING: list[dict[str, Curve]] = [
    {"rollout__surprise": moved(6.0, 0.5)},  # from random weights to text
    {"rollout__surprise": moved(1.0, 0.3)},  # a base learns from a sure teacher
    {"rollout__length": moved(256, 30), "rollout__finished": moved(0.0, 0.95)},  # it learns to stop
    {"rollout__length": moved(120, 300), "rollout__finished": moved(0.9, 0.7)},  # it learns to think
    {"rollout__length": at(64), "rollout__finished": at(0.0)},  # plain text, which never ends
    {"rollout__repeated": at(0.6)},  # as long texts do
    {"rollout__kl_to_base": moved(2.0, 1.0)},  # towards a base that is not its own
    {"rollout__reward": moved(0.3, 0.9), "eval__forward_kl": moved(0.4, 0.1), "eval__cross_entropy": moved(2.3, 2.0)},
    {"rollout__reward": moved(0.9, 0.3), "eval__forward_kl": moved(0.2, 0.4), "eval__cross_entropy": moved(2.0, 2.3)},  # all get worse
]


@pytest.mark.parametrize("curves", LEARNING)
def test_learning_raises_nothing(curves: dict[str, Curve]) -> None:
    for seed in range(2):
        assert risen(GOLDEN, 0.1, seed, **HEALTHY | curves) == {}


def test_only_metrics_that_are_there_are_looked_at() -> None:
    assert risen(GOLDEN, 0.1, 0, loss=at(1.0), tokens=at(0.0)) == {}


@pytest.mark.parametrize(
    "settings", [{"enabled": False}, {"repetition": {"level": 0.95}}, {"repetition": {"enabled": False}}, {"window_steps": 160}]
)
def test_a_threshold_or_a_switch_keeps_it_quiet(settings: dict[str, Any]) -> None:
    curves = HEALTHY | {"rollout__repeated": moved(0.2, 0.9)}
    assert set(risen(Alarms(), 0.1, 0, **curves)) == {"repetition"}
    assert risen(Alarms.model_validate(settings), 0.1, 0, **curves) == {}


def test_golden_may_be_a_metric_of_which_more_is_better_and_the_proxy_any() -> None:
    alarms = Alarms.model_validate({"golden": "eval/top1_agreement", "golden_versus_proxy": {"proxy": "loss/kd"}})
    worse: dict[str, Curve] = {"eval__top1_agreement": moved(0.7, 0.5), "loss__kd": moved(0.5, 0.2)}
    assert set(risen(alarms, 0.05, 0, **worse)) == {"golden_versus_proxy"}
    assert risen(alarms, 0.05, 0, **worse | {"eval__top1_agreement": moved(0.5, 0.7)}) == {}
    assert [m for m in ("loss/kd", "eval/t/reverse_kl", "eval/perplexity") if not smaller_is_better(m)] == []
    assert [m for m in ("rollout/reward", "eval/top1_agreement", "eval/student_topk_mass") if smaller_is_better(m)] == []


def test_a_finding_says_from_what_to_what_and_what_to_do() -> None:
    history = Alarms().history()
    for step in range(1, 41):
        history.add(step, {"rollout/repeated": 0.25 if step <= 20 else 0.75})
    (finding,) = Alarms().judge(history).values()
    assert finding.seen == "rollout/repeated was 0.25 in steps 1 to 20 and is 0.75 in steps 21 to 40"
    assert "train.lr" in str(finding)


def test_what_a_restart_takes_back_is_forgotten_and_what_is_not_finite_never_known() -> None:
    history = History(frozenset({"loss/kd"}))
    for step in (1, 2, 3, 4):
        history.add(step, {"rollout/length": float(step), "loss/kd": 1.0, "lr": 1.0} | ({"eval/x": 9.0} if step == 4 else {}))
    history.add(5, {"rollout/length": float("nan")})
    history.forget_after(3)
    assert history.names() == ["rollout/length", "loss/kd"]
    history.add(4, {"rollout/length": 10.0})
    latest, start = history.latest("rollout/length", 2), history.start("rollout/length", 2)
    assert latest and start and (latest.first, latest.last, latest.mean) == (3, 4, 6.5)
    assert (start.mean, start.error) == (1.5, 0.5)
    assert latest.error == pytest.approx(np.std([3, 10], ddof=1) / np.sqrt(2))
    assert history.start("rollout/length", 3) is None and history.latest("rollout/length", 5) is None


def test_golden_is_compared_with_its_best_evaluations() -> None:
    history = History()
    for step, value in enumerate([3.0, 1.0, 1.2, 2.0, 5.0, 6.0], 1):
        history.add(10 * step, {"eval/cross_entropy": value})
    best = history.best("eval/cross_entropy", 2)
    assert best and (best.first, best.last, best.mean) == (20, 30, pytest.approx(1.1))
    assert history.best("eval/cross_entropy", 4) is None
