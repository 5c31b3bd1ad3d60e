"""Chosen and rejected in turn: what the student wrote stands behind the row that it is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from strategies.core import Columns, Sampling
from strategies.objectives.preference import REDI, SimPO, pair_weights
from strategies.preference import SODA
from strategies.stages.judge import loss_counts
from strategies.stages.pairs import PairWeights
from strategies.stages.rollout import Rollout
from tests.strategies.test_rollout import Counting, bundle, rows

STAGE = Rollout(Sampling(max_new_tokens=3, seed=4, stop=(0,)), longest_tokens=8, paired=True, redrawn=False, endpoint="base")


def masks(columns: Columns) -> list[list[int]]:
    return [m.tolist() for m in np.split(columns["loss_mask"], np.cumsum(columns["lengths"])[:-1])]


def test_every_text_stands_behind_the_row_itself() -> None:
    out = STAGE(bundle(), Counting())
    assert rows(out)[:4] == [[5, 6, 7, 1, 2], [5, 6, 7, 120, 120, 120], [8, 3, 4, 5, 6], [8, 3, 4, 5, 121, 121, 121]]
    assert out["row_id"].tolist() == [20, 20, 21, 21, 22, 22] and out["written"].tolist() == [0, 1] * 3
    assert len(out["behaviour"]) == out["loss_mask"].sum()


def test_both_sides_share_a_prompt_of_which_nothing_is_predicted() -> None:
    plain = bundle()
    plain["loss_mask"][:] = 1
    plain["loss_mask"][[0, 5, 10]] = 0
    out = replace(STAGE, prompt_tokens=2, sampling=replace(STAGE.sampling, samples=2))(plain, Counting())
    assert masks(out)[:4] == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]] * 2 and masks(out)[8:10] == [[0, 0, 1], [0, 0, 1, 1, 1]]
    assert out["sample"].tolist() == [0, 0, 1, 1] * 3


def test_a_later_epoch_reads_the_same_texts() -> None:
    author = Counting()
    for step in (1, 2):
        STAGE(bundle(step), author)
    assert [sampling for _, sampling in author.asked] == [STAGE.sampling] * 2


def test_a_snapshots_texts_are_those_of_the_student_as_it_began() -> None:
    assert STAGE(bundle(step=9), Counting())["written_by"].tolist() == [-1, 0] * 3


def test_what_cannot_be_a_pair_is_left_out_whole() -> None:
    unanswered = bundle(prompts=([5] * 9, [8], [9, 10]))
    unanswered["loss_mask"][unanswered["tokens"] == 7] = 0  # the third row's completion
    out = STAGE(unanswered, Counting())
    assert out["row_id"].tolist() == [21, 21] and out["rollout/left_out"].tolist() == [2]
    nothing = PairWeights("dpo")(STAGE(bundle(prompts=([5] * 9, [8] * 9, [9] * 9)), Counting()), None)
    assert len(nothing["lengths"]) == len(nothing["tokens"]) == len(nothing["weights/dpo"]) == 0


def test_estimates_know_the_doubled_rows() -> None:
    lengths = np.asarray([5, 5, 3])
    out = STAGE(bundle(), Counting())
    assert (STAGE.longest_rows(lengths) >= out["lengths"]).all() and STAGE.longest_rows(lengths).tolist() == [5, 8, 5, 8, 3, 6]
    several = replace(STAGE, sampling=replace(STAGE.sampling, samples=2))
    assert several.longest_rows(lengths[:1]).tolist() == [5, 8, 5, 8]
    assert replace(several, paired=False).longest_rows(lengths).tolist() == [8, 8, 8, 8, 6, 6]


def test_every_pair_weighs_one_unless_its_texts_are_equal() -> None:
    columns = STAGE(bundle(), Counting())
    assert np.array_equal(PairWeights("dpo")(columns, None)["weights/dpo"], pair_weights(loss_counts(columns)))
    same = {**columns, "tokens": columns["tokens"].copy()}
    same["tokens"][:11] = [5, 6, 7, 1, 2, 5, 6, 7, 1, 2, 2]
    assert np.count_nonzero(PairWeights("dpo")(same, None)["weights/dpo"]) == 3
    same["tokens"] = np.asarray([5, 6, 1, 5, 6, 1, 5, 7, 5, 8])
    same |= {"lengths": np.asarray([3, 3, 2, 2]), "written": np.asarray([0, 1, 0, 1], np.uint8)}
    same["loss_mask"] = np.asarray([0, 1, 1, 0, 1, 1, 0, 1, 0, 1], np.uint8)
    assert PairWeights("dpo")(same, None)["weights/dpo"].tolist() == [0, 0, 0, 0, 1, 0]


def test_only_texts_that_were_found_wrong_are_rejected() -> None:
    columns = STAGE(bundle(), Counting())
    columns |= {"reward": np.asarray([0, 1, 0, 0, 0, 0], np.float32), "judged": np.asarray([0, 1, 0, 1, 0, 0], np.uint8)}
    weights = PairWeights("dpo", judged=True)(columns, None)["weights/dpo"]
    (at,) = np.flatnonzero(weights)
    assert at == loss_counts(columns)[:2].sum()


def test_held_out_rows_weigh_nothing_and_rows_out_of_turn_are_a_mistake() -> None:
    out = PairWeights("dpo")(STAGE(bundle(step=0), Counting()), None)
    assert not out["weights/dpo"].any() and len(out["weights/dpo"]) == out["loss_mask"].sum()
    with pytest.raises(ValueError, match="given and written in turn"):
        PairWeights("dpo")(replace(STAGE, paired=False)(bundle(), Counting()), None)


def test_the_preference_is_over_pairs_and_both_sides_are_watched() -> None:
    strategy = SODA(verifier="checker", reference="teacher").build()
    assert [s.endpoint for s in strategy.stages] == ["base", "teacher", "checker", None, None, None]
    assert strategy.rows_together == 2 and not strategy.authors and list(strategy.signals) == ["teacher"]
    (update,) = strategy.updates
    assert [(t.name, t.watched) for t in update.terms] == [("dpo", False), ("chosen", True), ("rejected", True)]  # type: ignore[union-attr]
    assert [a.write.endpoint for a in SODA(teacher="teacher").build().authors] == ["teacher"]


@pytest.mark.parametrize(("given", "objective"), [("simpo", SimPO()), ({"type": "redi", "alpha": 0.5}, REDI(alpha=0.5))])
def test_a_preference_without_a_reference_asks_nobody(given: Any, objective: SimPO | REDI) -> None:
    soda = SODA.model_validate({"without_reference": given})
    strategy = soda.build()
    assert SODA.model_validate(soda.model_dump()) == soda and not strategy.signals and strategy.rows_together == 2
    assert [s.endpoint for s in strategy.stages] == ["base", None, None, None]
    term = strategy.updates[0].terms[0]
    assert (term.name, term.objective, term.signal) == (objective.type, objective, None)
    assert any(f"weights/{objective.type}" in s.adds for s in strategy.stages)
    with pytest.raises(ValidationError, match="which is DPO's"):
        SODA.model_validate({"without_reference": given, "reference": "teacher"})
