"""A teacher that reads rows behind a context answers about the very tokens that the student wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from strategies import STRATEGIES
from strategies.core import Columns, ScoreRequest
from strategies.stages.view import Context, ScoreBehind

DENSE = ScoreRequest("dense")
IDS = 4
CONTEXT = Context("Solution: {reference}\n", before=(90, 91), between=(92,), endings=(0,))
STAGE = ScoreBehind("self", "self", DENSE, "kd", CONTEXT)


class Reading:
    """Answers with what it has read: the token, the one before it, its place, and a hash of all before it."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        ends = np.cumsum(columns["lengths"])
        found: list[list[int]] = []
        for end, size in zip(ends.tolist(), columns["lengths"].tolist(), strict=True):
            tokens, mask = columns["tokens"][end - size : end].tolist(), columns["loss_mask"][end - size : end]
            self.rows.append(tokens)
            found += [[tokens[i], tokens[i - 1], int(i), hash(tuple(tokens[:i])) % 1000] for i in np.flatnonzero(mask)]
        return {"dense": np.asarray(found, np.float32).ravel(), "logprob": np.zeros(len(found)), "dropped_mass": np.zeros(1)}


def bundle(step: int = 3) -> Columns:
    """Two written rows, one that is the data's own, and a written one without a reference."""
    rows = [([5, 6], [20, 21, 22]), ([7], [23]), ([8, 9], [24, 0]), ([5], [25, 26])]
    references = [[30, 31, 0], [32, 0], [24, 0], [0]]
    return {
        "tokens": np.asarray([t for p, c in rows for t in p + c], np.int32),
        "loss_mask": np.asarray([m for p, c in rows for m in [0] * len(p) + [1] * len(c)], np.uint8),
        "lengths": np.asarray([len(p + c) for p, c in rows], np.int32),
        "row_id": np.arange(4),
        "written": np.asarray([1, 1, 0, 1], np.uint8),
        "reference": np.asarray([t for r in references for t in r], np.int32),
        "reference_lengths": np.asarray([len(r) for r in references], np.int32),
        "step": np.asarray([step]),
    }


def answers(columns: Columns) -> list[list[int]]:
    return [[int(v) for v in line] for line in columns["self/dense"].reshape(-1, IDS)]


def test_a_row_is_read_behind_its_reference_and_answered_token_by_token() -> None:
    given, teacher = bundle(), Reading()
    out = STAGE(given, teacher)
    assert teacher.rows[:2] == [[90, 91, 30, 31, 92, 5, 6, 20, 21, 22], [90, 91, 32, 92, 7, 23]]
    labels = given["tokens"][given["loss_mask"] > 0].tolist()
    assert [token for token, *_ in answers(out)] == labels
    assert answers(out)[1][1:3] == [20, 8] and answers(out)[3][1:3] == [7, 5]
    assert answers(out)[0][3] == hash((90, 91, 30, 31, 92, 5, 6)) % 1000
    assert all(np.array_equal(out[name], given[name]) for name in given), "the student reads its own rows"
    assert STAGE.adds <= set(out) and STAGE.needs <= set(given)


def test_rows_that_would_tell_their_own_answer_and_rows_without_a_reference_do_not_count() -> None:
    out = STAGE(bundle(), teacher := Reading())
    assert teacher.rows[2:] == [[8, 9, 24, 0], [5, 25, 26]]
    assert out["weights/kd"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0] and out["weights/kd"].dtype == np.float32
    assert out["self/left_out"].tolist() == [1], "the data's own row is not one that the student wrote"


def test_a_row_without_room_for_its_context_does_not_count() -> None:
    tight = replace(STAGE, context=replace(CONTEXT, longest_tokens=9))
    out = tight(bundle(), teacher := Reading())
    assert teacher.rows[0] == [5, 6, 20, 21, 22] and len(teacher.rows[1]) == 6
    assert out["weights/kd"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0] and out["self/left_out"].tolist() == [2]


def test_held_out_rows_are_read_without_what_their_completions_say() -> None:
    given, teacher = bundle(step=0), Reading()
    out = STAGE(given, teacher)
    assert teacher.rows == [[5, 6, 20, 21, 22], [7, 23], [8, 9, 24, 0], [5, 25, 26]]
    assert out["weights/kd"].all() and not out["self/left_out"].any()


def test_an_empty_context_shows_every_row_as_it_is_and_counts_all() -> None:
    out = replace(STAGE, context=Context(""))(bundle(), teacher := Reading())
    assert [len(r) for r in teacher.rows] == [5, 2, 4, 3] and out["weights/kd"].all()


def test_a_context_without_a_reference_says_the_same_of_every_row() -> None:
    fixed = replace(STAGE, context=Context("Be brief.", before=(90, 91)))
    out = fixed(bundle(), teacher := Reading())
    assert [r[:2] for r in teacher.rows] == [[90, 91]] * 4 and out["weights/kd"].all()


def test_what_every_text_begins_with_stays_in_front() -> None:
    started = replace(STAGE, context=replace(CONTEXT, opening=(5,)))
    started(bundle(), teacher := Reading())
    assert teacher.rows[0] == [5, 90, 91, 30, 31, 92, 6, 20, 21, 22] and teacher.rows[1][:2] == [90, 91]


def test_an_earlier_weight_is_kept() -> None:
    weighed = bundle() | {"weights/kd": np.full(8, 0.5, np.float32)}
    assert STAGE(weighed, Reading())["weights/kd"].tolist() == [0.5] * 4 + [0.0] * 4


def test_a_bundle_without_rows_passes() -> None:
    empty = {name: values[:0] if name != "step" else values for name, values in bundle().items()}
    out = STAGE(empty, Reading())
    assert not len(out["weights/kd"]) and not len(out["tokens"])


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("opsd", {"student_share": 0.5}, "student_share 1 or a ce_weight"),
        ("sdft", {"take": {"type": "hidden"}}, "another take than hidden"),
        ("sdft", {"average_rate": 1.0}, "less than 1"),
    ],
)
def test_settings_that_teach_nothing_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        STRATEGIES[name].model_validate(settings)


@pytest.mark.parametrize(("weights", "rate"), [("frozen", 0.0), ("average", 0.05), ("live", 1.0)])
def test_the_teachers_weights_follow_as_they_are_told(weights: str, rate: float) -> None:
    strategy = STRATEGIES["sdft"].model_validate({"weights": weights}).build()
    assert strategy.follows["self"].rate == rate
    assert [s.endpoint for s in strategy.stages] == ["student", "self"]
