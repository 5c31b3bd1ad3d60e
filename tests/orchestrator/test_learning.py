"""Every strategy in which the student writes learns its toy: on its own texts it comes closer to the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness_rollouts import Loop, make_toy

DENSE = {"type": "dense"}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "gkd": ({"type": "gkd", "take": DENSE}, 0.15),
    "gkd-half-stale": ({"type": "gkd", "take": DENSE, "student_share": 0.5, "staleness": 2}, 0.15),
    "opd": ({"type": "opd"}, 0.5),
    "g-opd": ({"type": "g-opd"}, 0.5),
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
