"""Teachers of which each knows a half teach together what one who knows all would: on given text and on the student's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies.core import Columns, ScoreRequest
from tests.harness_rollouts import VOCABULARY, Loop, make_toy


class Half:
    """Says what `whole` says after tokens of one parity, and after others that it has no idea."""

    def __init__(self, parity: int):
        self.parity, self.whole = parity, None

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        """See `strategies.core.Endpoint`; answers dense requests."""
        assert self.whole is not None
        answers = self.whole.score(columns, request)
        before = columns["tokens"][np.flatnonzero(columns["loss_mask"]) - 1]
        knows = before % 2 == self.parity
        dense = np.where(knows[:, None], answers["dense"].reshape(len(before), -1), -np.log(VOCABULARY)).astype(np.float32)
        label = np.where(knows, answers["logprob"], -np.log(VOCABULARY)).astype(np.float32)
        return {**answers, "dense": dense.ravel(), "logprob": label}


def left(toy: Path, strategy: dict[str, Any]) -> float:
    """Share of the divergence from the teacher, on the student's own texts, that is left after thirty steps with two halves of it."""
    halves = {"even": Half(0), "odd": Half(1)}
    settings = {"type": "multi-teacher", "teachers": list(halves), "take": "dense", "ce_weight": 0.0, "student_share": 0.5}
    loop = Loop(toy, {**settings, **strategy}, **halves)
    for half in halves.values():
        half.whole = loop.endpoints["teacher"]
    before = loop.divergence()
    loop.train()
    return loop.divergence() / before


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize(
    "strategy",
    [
        {"gate": {"by": "entropy", "best": True}},
        {"gate": {"by": "confidence", "sharpness": 40.0}},
        {"combine": "product", "gate": {"by": "entropy", "sharpness": 20.0}, "objective": "reverse-kl"},
        {"combine": "sum", "gate": {"by": "entropy", "sharpness": 20.0}},
    ],
    ids=["best-by-entropy", "confident", "product", "sum"],
)
def test_the_student_follows_whoever_knows(toy: Path, strategy: dict[str, Any]) -> None:
    assert left(toy, strategy) < 0.25


def test_a_mixture_that_asks_nobody_how_sure_they_are_teaches_doubts(toy: Path) -> None:
    assert left(toy, {}) > 0.3
