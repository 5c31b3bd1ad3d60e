"""The base that a student is compared with: asked once a token, for the log-probability alone, by whoever does it anyway if it can."""

from __future__ import annotations

import pytest

from strategies.core import ScoreRequest, Strategy, StrategyConfig
from strategies.on_policy import GKD
from strategies.policy import GOPD, OPD
from strategies.sources import TakeHidden
from strategies.stages.score import Score


def asked(strategy: Strategy) -> list[tuple[str, str, str]]:
    return [(s.signal, s.endpoint, s.request.kind) for s in strategy.stages if isinstance(s, Score)]


TEACHER = ("teacher", "teacher", "topk")


@pytest.mark.parametrize(
    ("settings", "base", "scores"),
    [
        (GKD(), None, [TEACHER]),
        (GKD(base="first"), "first", [TEACHER, ("first", "first", "per-token")]),
        (GKD(base="teacher"), "teacher", [TEACHER]),
        (
            GKD(base="teacher", take=TakeHidden()),
            "teacher-base",
            [("teacher", "teacher", "hidden"), ("teacher-base", "teacher", "per-token")],
        ),
        (OPD(base="first"), "first", [TEACHER, ("first", "first", "per-token")]),
        (GOPD(), "base", [TEACHER, ("base", "base", "per-token")]),
        (GOPD(base="base"), "base", [TEACHER, ("base", "base", "per-token")]),
        (GOPD(base="first"), "first", [TEACHER, ("base", "base", "per-token"), ("first", "first", "per-token")]),
    ],
)
def test_who_is_asked_for_the_base(settings: StrategyConfig, base: str | None, scores: list[tuple[str, str, str]]) -> None:
    strategy = settings.build()
    assert (strategy.base, asked(strategy)) == (base, scores)
    assert base is None or base == "base" or base == "teacher" or base not in strategy.signals
    if base:
        assert f"{base}/logprob" in {column for stage in strategy.stages for column in stage.adds}


def test_a_base_costs_one_number_a_token() -> None:
    stage = next(s for s in GKD(base="first").build().stages if isinstance(s, Score) and s.endpoint == "first")
    assert stage.request == ScoreRequest("per-token")


def test_the_student_in_training_is_no_base() -> None:
    with pytest.raises(ValueError, match="stay as they are"):
        GKD(base="student")
