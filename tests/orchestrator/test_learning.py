"""Every strategy in which the student writes learns its toy: on its own texts it comes closer to the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness_rollouts import VOCABULARY, Loop, Says, make_toy

DENSE = {"type": "dense"}
ALONE = {"student_share": 1.0, "given_ce_weight": 0, "given_kl_weight": 0}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "adakd": ({"type": "adakd", "take": DENSE, "student_share": 1.0, "focus": {"warmup_updates": 3, "decay": 0.5}}, 0.3),
    "gkd": ({"type": "gkd", "take": DENSE}, 0.15),
    "gkd-half-stale": ({"type": "gkd", "take": DENSE, "student_share": 0.5, "staleness": 2}, 0.15),
    "opd": ({"type": "opd"}, 0.5),
    "g-opd": ({"type": "g-opd"}, 0.5),
    "minillm": ({"type": "minillm", "take": DENSE}, 0.25),
    "minillm-alone": ({"type": "minillm", "take": DENSE, **ALONE, "staleness": 1}, 0.35),
    "tsd": ({"type": "token-selective-dual-kd", "candidates": 4, "entropy_weight": 0.01}, 0.4),
    "tsd-indirect": ({"type": "token-selective-dual-kd", "candidates": 4, "direct_weight": 0, "entropy_weight": 0}, 0.8),
}
"""Strategies, and the share of the divergence from the teacher that may be left after thirty steps."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("name", CASES)
def test_the_student_comes_closer_to_the_teacher_on_its_own_texts(toy: Path, name: str) -> None:
    strategy, left = CASES[name]
    loop = Loop(toy, strategy)
    before = loop.divergence()
    loop.train()
    after = loop.divergence()
    assert after < left * before, f"{before:.3f} nats per token, then {after:.3f}"


def test_fewer_tokens_are_kept_as_the_loss_falls(toy: Path) -> None:
    loop = Loop(toy, CASES["adakd"][0])
    shares = [loop.controls.values["kept_share"] for _ in range(12) if loop.step()]
    assert shares[2] == 1.0 > shares[-1]


def test_a_student_that_knows_nothing_seldom_says_what_a_verifier_wants(toy: Path) -> None:
    loop = Loop(toy, {"type": "opd"}, verifier=Says(5))
    assert 0.1 < loop.reward() < 0.5  # about 1 - (23 / 24)^7


def test_each_step_is_written_by_the_student_that_is_due(toy: Path) -> None:
    loop = Loop(toy, {"type": "opd", "staleness": 1}, {"steps": 3})
    found = [loop.step()[1] for _ in range(3)]
    assert [bundle["policy_version"].tolist() for bundle in found] == [[0], [0], [1]]
    assert all(bundle["written"].all() and len(bundle["row_id"]) == 48 for bundle in found)


REWARDED: dict[str, dict[str, Any]] = {
    "kdrl": {"type": "kdrl", "samples": 4, "teacher_weight": 5e-3},
    "kdrl-stale": {"type": "kdrl", "samples": 4, "teacher_weight": 5e-3, "teacher_mask": "failed-group", "staleness": 1},
    "grpo": {"type": "kdrl", "samples": 4, "teacher_weight": 0.0},
    "rlad": {"type": "rlad", "samples": 4, "ratio_anchor": 0.9, "clip_ratio": [0.5, 1.0]},
}


@pytest.mark.parametrize("name", REWARDED)
def test_the_student_says_more_often_what_a_verifier_wants(toy: Path, name: str) -> None:
    loop = Loop(toy, REWARDED[name], verifier=Says(5))
    before = loop.reward()
    loop.train()
    assert loop.reward() > before + 0.3, f"{before:.2f}, then {loop.reward():.2f}"


def test_a_strong_teacher_beside_the_verifier_is_followed(toy: Path) -> None:
    loop = Loop(toy, {"type": "kdrl", "samples": 4, "teacher_weight": 1.0, "outcome_weight": 0.01}, verifier=Says(5))
    before = loop.divergence()
    loop.train()
    assert loop.divergence() < 0.6 * before


def test_the_student_learns_inner_states_of_a_wider_and_deeper_teacher_on_its_own_texts(tmp_path: Path) -> None:
    layers = [{"student": {"number": 1}, "teacher": {"depth": 0.5}}, "output"]
    strategy = {
        "type": "inner-states",
        "student_share": 1.0,
        "objective": {"type": "hidden-states", "layers": layers, "distance": "mse"},
        "kd_weight": 1.0,
        "temperature": 1.0,
        "top_k": VOCABULARY,
    }
    loop = Loop(make_toy(tmp_path, teacher_width=48, teacher_layers=3), strategy)
    before, (first, bundle) = loop.divergence(), loop.step()
    assert bundle["written"].all() and not bundle["weights/ce"].any(), "the data's completions are nowhere"
    last = [loop.step()[0] for _ in range(loop.steps - 1)][-1]
    assert last["loss/states"] < 0.7 * first["loss/states"] and last["loss/ce"] == 0.0
    assert loop.divergence() < 0.6 * before
