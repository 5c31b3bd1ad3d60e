"""Every strategy for a teacher with another tokenizer teaches a student of bytes its language, off-policy and on its own texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies.stages.align import NONE
from tests.harness_tokens import Lesson, make_language

CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "alm": ({"type": "alm", "ce_weight": 0.0}, "kd", 0.45),
    "alm-likelihoods": ({"type": "alm", "temperature": 1.0, "distance": "total-variation"}, "kd", 0.45),
    "alm-debiased": ({"type": "alm", "debias": True, "ce_weight": 0.0}, "kd", 0.45),
    "uld": ({"type": "uld"}, "kd", 0.45),
    "gold": ({"type": "gold", "ce_weight": 0.0}, "shared", 0.45),
    "dskd": ({"type": "dskd", "ce_weight": 0.0, "filters_lr": 2e-2}, "teacher-space", 0.45),
}
"""Strategies, a term of each, and the share of the held-out cross-entropy that may be left after forty steps."""


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language(tmp_path_factory.mktemp("language"))


@pytest.mark.parametrize("name", CASES)
def test_a_student_of_bytes_learns_from_a_teacher_of_pieces(language: Path, name: str) -> None:
    strategy, term, left = CASES[name]
    lesson = Lesson(language, strategy)
    before = lesson.cross_entropy()
    metrics = lesson.train()
    after = lesson.cross_entropy()
    assert after < left * before, f"{before:.3f} nats per byte, then {after:.3f}"
    assert metrics[-1][f"loss/{term}"] < 0.6 * metrics[0][f"loss/{term}"]


@pytest.mark.parametrize("kind", ["alm", "gold", "dskd"])
def test_a_student_learns_from_what_the_teacher_says_of_its_own_texts(language: Path, tmp_path: Path, kind: str) -> None:
    begun = Lesson(language, {"type": "cross-entropy"}, {"steps": 12})
    begun.train()
    begun.save(language / f"begun-{kind}")
    strategy = {"type": kind, "student_share": 0.75, "max_new_tokens": 24, "prompt_tokens": 8, "ce_weight": 0.0}
    lesson = Lesson(language, strategy, {"steps": 30, "lr": 5e-3}, student=f"begun-{kind}")
    before = lesson.cross_entropy()
    _, columns = lesson.step()
    assert columns["written"].any() and (columns["teacher/span"] != NONE).mean() > 0.3
    lesson.train()
    assert lesson.cross_entropy() < 0.8 * before
    assert np.isfinite(lesson.step()[0]["loss"])
