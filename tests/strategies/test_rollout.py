"""Rows that the student writes take the place of the data's, row by row and repeatably."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from strategies.control import Controlled
from strategies.core import Columns, Endpoint, Sampling, ScoreRequest
from strategies.schedule import constant
from strategies.stages.rollout import Rollout, RowsOf

PROMPTS = ([5, 6, 7], [8], [9, 10])
COMPLETIONS = ([1, 2], [3, 4, 5, 6], [7])
STAGE = Rollout(Sampling(samples=2, max_new_tokens=3, seed=4, stop=(0,)), longest_tokens=8)


class Counting:
    """Writes 100 + row for as long as it may, and remembers its questions."""

    def __init__(self) -> None:
        self.asked: list[tuple[Columns, Sampling]] = []

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        raise NotImplementedError

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        self.asked.append((columns, sampling))
        n = sampling.samples
        lengths = np.repeat(columns["max_new_tokens"], n).astype(np.int32)
        ids = np.repeat(columns["row_id"], n)
        return {
            "tokens": np.repeat(100 + ids, lengths).astype(np.int32),
            "lengths": lengths,
            "row_id": ids.astype(np.int64),
            "sample": np.tile(np.arange(n), len(columns["row_id"])).astype(np.int32),
            "finished": np.zeros(len(ids), np.uint8),
            "logprobs": -np.ones(int(lengths.sum()), np.float32),
        }


def bundle(step: int = 3, prompts: tuple[list[int], ...] = PROMPTS) -> Columns:
    rows = [(p + c, [0] * len(p) + [1] * len(c)) for p, c in zip(prompts, COMPLETIONS, strict=True)]
    control = {"step": step, "steps": 10, "bundle": 1, "attempt": 1, "rows_total": 3}
    return {
        "tokens": np.asarray([t for tokens, _ in rows for t in tokens], np.int32),
        "loss_mask": np.asarray([m for _, mask in rows for m in mask], np.uint8),
        "lengths": np.asarray([len(tokens) for tokens, _ in rows], np.int32),
        "row_id": np.asarray([20, 21, 22], np.int64),
        **{name: np.asarray([value], np.int64) for name, value in control.items()},
    }


def rows(columns: Columns) -> list[list[int]]:
    return [r.tolist() for r in np.split(columns["tokens"], np.cumsum(columns["lengths"])[:-1])]


def test_every_prompt_is_continued_and_its_own_completion_is_the_reference() -> None:
    out = STAGE(bundle(), Counting())
    assert rows(out)[:2] == [[5, 6, 7, 120, 120, 120]] * 2 and rows(out)[4:] == [[9, 10, 122, 122, 122]] * 2
    assert out["row_id"].tolist() == [20, 20, 21, 21, 22, 22] and out["sample"].tolist() == [0, 1] * 3
    assert out["written"].all() and (out["behaviour"] == -1).all()
    assert len(out["behaviour"]) == out["loss_mask"].sum() == 18
    assert np.split(out["reference"], np.cumsum(out["reference_lengths"])[:-1])[0].tolist() == [1, 2]
    assert STAGE.adds <= set(out)
    assert set(out["written_by"].tolist()) == {2}, "the student that step 3 begins with, where nobody says otherwise"
    older = STAGE(bundle() | {"policy_version": np.asarray([1], np.int64)}, Counting())
    assert set(older["written_by"].tolist()) == {1}


def test_plain_text_lends_its_first_tokens() -> None:
    plain = bundle()
    plain["loss_mask"][:] = 1
    plain["loss_mask"][0] = 0
    out = replace(STAGE, prompt_tokens=2)(plain, Counting())
    assert rows(out)[0] == [5, 6, 120, 120, 120] and rows(out)[2][:2] == [8, 3]


def test_held_out_rows_stay_as_they_are() -> None:
    given, author = bundle(step=0), Counting()
    out = STAGE(given, author)
    assert not author.asked and not out["written"].any()
    assert all(np.array_equal(out[name], given[name]) for name in given)


def test_a_share_of_the_rows_is_written_and_the_same_ones_again() -> None:
    half = replace(STAGE, share=constant(0.5))
    seen = [half(bundle(step), Counting())["written"] for step in range(1, 200)]
    again = [half(bundle(step), Counting())["written"] for step in range(1, 200)]
    assert all(np.array_equal(a, b) for a, b in zip(seen, again, strict=True))
    drawn = sum(w.sum() / 2 for w in seen) / (3 * len(seen))
    assert 0.42 < drawn < 0.58
    none = replace(STAGE, share=constant(0.0))(bundle(), Counting())
    assert np.array_equal(none["tokens"], bundle()["tokens"])


def test_a_share_may_be_a_controllers_value() -> None:
    moving = replace(STAGE, share=Controlled("mine"))
    assert moving.needs == STAGE.needs | {"control/mine"}
    for value, count in ((0.0, 0), (1.0, 6)):
        assert moving(bundle() | {"control/mine": np.asarray([value])}, Counting())["written"].sum() == count


def test_each_step_draws_anew() -> None:
    author = Counting()
    for step in (1, 2, 1):
        STAGE(bundle(step), author)
    first, second, third = (sampling.seed for _, sampling in author.asked)
    assert first == third != second


def test_a_text_gets_what_room_there_is_and_a_prompt_without_any_is_counted() -> None:
    long = ([5] * 7, [8] * 9, [9, 10])
    out = STAGE(bundle(prompts=long), Counting())
    assert [len(r) for r in rows(out)] == [8, 8, 5, 5]
    assert out["rollout/left_out"].tolist() == [1] and out["row_id"].tolist() == [20, 20, 22, 22]


def test_a_term_may_count_on_written_rows_only() -> None:
    columns = replace(STAGE, share=constant(0.5))(bundle(5), Counting())
    assert 0 < columns["written"].sum() < len(columns["written"])
    written, given = RowsOf("a", "written")(columns, None)["weights/a"], RowsOf("a", "given")(columns, None)["weights/a"]
    assert np.array_equal(written + given, np.ones(int(columns["loss_mask"].sum())))
    assert np.array_equal(written > 0, columns["behaviour"] < 0)


def test_a_row_that_comes_twice_is_written_twice() -> None:
    twice = bundle()
    twice["row_id"][:] = 20
    out = STAGE(twice, Counting())
    assert [r[:2] for r in rows(out)] == [[5, 6]] * 2 + [[8, 3]] * 2 + [[9, 10]] * 2


def test_only_an_author_can_answer() -> None:
    class Scorer:
        def score(self, columns: Columns, request: ScoreRequest) -> Columns:
            return {}

    silent: Endpoint = Scorer()
    with pytest.raises(ValueError, match="does not"):
        STAGE(bundle(), silent)
