"""Columns of the student's own text become the signal that policy gradients read."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from orchestrator.microbatch import cut
from orchestrator.teachers import Teachers
from strategies.acted import Acted
from strategies.core import Columns, Player, Strategy, Term, lm_update
from strategies.objectives.policy import PolicyGradient
from strategies.schedule import constant
from strategies.sources import TakenActions, TakeTopK, Taught, scored_columns
from tests.orchestrator.bench import Bench

TERMS = (Term("pg", PolicyGradient(), constant(1.0), signal="acts"),)
SOURCES = {"acts": TakenActions(teacher="judge", reference="start", outcome=True)}
NAMES = ("behaviour", "judge/logprob", "start/logprob", "advantage", "token_reward", "group_failed")


def bundle() -> Columns:
    """Two rows of three and two loss tokens; the i-th loss token has 10 times its column's number plus i."""
    columns: Columns = {
        "tokens": np.arange(8, dtype=np.int32),
        "lengths": np.asarray([4, 4], dtype=np.int32),
        "loss_mask": np.asarray([0, 1, 1, 1, 0, 0, 1, 1], dtype=np.uint8),
        "row_id": np.asarray([3, 4], dtype=np.int64),
    }
    return columns | {name: (10.0 * i + np.arange(5)).astype(np.float32) for i, name in enumerate(NAMES)}


def test_every_loss_token_gets_its_own_numbers() -> None:
    wanted, teachers = scored_columns(SOURCES), Teachers(SOURCES)
    found = {}
    for micro in cut(bundle(), wanted, "bucketed", micro_batch_tokens=4, max_length_tokens=4):
        signal = teachers.teach(micro, TERMS).signals["acts"]
        assert isinstance(signal, Acted)
        for label, *numbers in zip(micro.labels.tolist(), *(getattr(signal, f.name).tolist() for f in fields(Acted)), strict=True):
            found[label] = numbers
    assert found == {label: [10.0 * i + at for i in range(6)] for at, label in enumerate((1, 2, 3, 6, 7))}


def test_a_bundle_without_one_of_the_columns_is_refused_by_name() -> None:
    columns = bundle()
    del columns["advantage"]
    with pytest.raises(ValueError, match="signal column 'advantage': got a bundle with .*; expected a stage to have added it"):
        cut(columns, scored_columns(SOURCES), "bucketed", 4, 4)


def test_a_micro_batch_without_loss_tokens_needs_none() -> None:
    (micro, *_) = cut(bundle(), scored_columns(SOURCES), "bucketed", 4, 4)
    assert Teachers(SOURCES).teach(micro.dummy(), TERMS).signals == {}
    assert torch.equal(micro.dummy().columns["advantage"], torch.zeros(0, 1))


STRATEGY = Strategy(players={"student": Player()}, updates=(lm_update(*TERMS),), signals=SOURCES)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (STRATEGY, ["the signal column", "which no stage adds"]),
        (replace(STRATEGY, signals={"acts": Taught(TakeTopK(), endpoint="judge")}), ["'pg', which reads what is known of tokens"]),
    ],
)
def test_a_strategy_without_such_text_is_refused_before_it_runs(bench: Bench, strategy: Strategy, words: list[str]) -> None:
    said = bench.refusal_of(strategy)
    assert [word for word in words if word not in said] == [], said
