"""Every strategy for a teacher with another tokenizer teaches a student of bytes its language, off-policy and on its own texts."""

from __future__ import annotations

import copy
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
    "dskd": ({"type": "dskd", "filters_lr": 2e-2}, "teacher-space", 0.45),
    "dskd-exact": ({"type": "dskd", "filters_lr": 2e-2, "alignment": "exact"}, "task", 0.45),
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


OWN_TEXTS: dict[str, dict[str, Any]] = {"alm": {"ce_weight": 0.0}, "gold": {"ce_weight": 0.0}, "dskd": {"filters_lr": 2e-2}}


@pytest.mark.parametrize("kind", OWN_TEXTS)
def test_a_student_learns_from_what_the_teacher_says_of_its_own_texts(language: Path, tmp_path: Path, kind: str) -> None:
    begun = Lesson(language, {"type": "cross-entropy"}, {"steps": 12})
    begun.train()
    begun.save(language / f"begun-{kind}")
    strategy = {"type": kind, "student_share": 0.75, "max_new_tokens": 24, "prompt_tokens": 8, **OWN_TEXTS[kind]}
    lesson = Lesson(language, strategy, {"steps": 30, "lr": 5e-3}, student=f"begun-{kind}")
    before = lesson.cross_entropy()
    _, columns = lesson.step()
    assert columns["written"].any() and (columns["teacher/span"] != NONE).mean() > 0.3
    lesson.train()
    assert lesson.cross_entropy() < 0.8 * before
    assert np.isfinite(lesson.step()[0]["loss"])


STEPPED = ("loss", "loss/task", "loss/student-space", "loss/teacher-space", "grad_norm", "gradient_share/teacher-space")


@pytest.mark.parametrize("alignment", ["attention", "exact"])
def test_spaces_do_not_depend_on_how_a_bundle_is_cut(language: Path, alignment: str) -> None:
    strategy = {"type": "dskd", "alignment": alignment, "filters_lr": 2e-2}
    whole, parts = (Lesson(language, strategy, {"micro_batch_tokens": tokens}) for tokens in (4096, 128))
    for _ in range(3):
        (one, _), (many, _) = whole.step(), parts.step()
        assert one["micro_batches"] == 1 < many["micro_batches"]
        assert [many[n] for n in STEPPED[:5]] == pytest.approx([one[n] for n in STEPPED[:5]], rel=2e-4)


def test_filters_with_a_learning_rate_of_their_own_go_on_from_a_checkpoint(language: Path) -> None:
    strategy = {"type": "dskd", "filters_lr": 2e-2}
    lesson, again = Lesson(language, strategy), Lesson(language, strategy)
    for _ in range(2):
        lesson.step()
    student = next(iter(lesson.networks.players.values()))
    kept = copy.deepcopy(student.state())
    wanted = [lesson.step()[0] for _ in range(2)]
    other = next(iter(again.networks.players.values()))
    other.state()  # what a checkpoint is read into
    other.load(kept)
    again.done = 2
    found = [again.step()[0] for _ in range(2)]
    assert [[m[n] for n in STEPPED] for m in found] == [[m[n] for n in STEPPED] for m in wanted]
