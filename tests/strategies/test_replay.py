"""Recalled texts: which rows they replace, which texts they are, and that the student's own stage leaves them alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from strategies.core import Columns, Sampling, ScoreRequest
from strategies.schedule import constant
from strategies.stages.lines import joined, lines_of
from strategies.stages.replay import Replay, fresh_rows
from strategies.stages.rollout import Rollout
from tests.strategies.test_rollout import Counting, bundle, rows

SHARE, FRESH = 0.7, 0.3
ROLLOUT = Rollout(Sampling(samples=2, max_new_tokens=3, seed=4, stop=(0,)), constant(SHARE), staleness=1, longest_tokens=8)
STAGE = Replay(ROLLOUT, constant(1 - FRESH), capacity_rows=4)


def text(step: int, row: int, sample: int) -> Columns:
    """One text of a log, which tells whose it is."""
    size = 2 + (step + row + sample) % 3
    tokens = np.full(size, 1000 + 100 * step + 10 * row + sample, np.int32)
    return {
        "tokens": tokens,
        "lengths": np.asarray([size], np.int32),
        "loss_mask": np.asarray([0] + [1] * (size - 1), np.uint8),
        "row_id": np.asarray([row], np.int64),
        "sample": np.asarray([sample], np.int32),
        "finished": np.asarray([sample == 0], np.uint8),
        "written": np.ones(1, np.uint8),
        "written_by": np.asarray([max(0, step - 2)], np.int64),
        "behaviour": np.full(size - 1, -step, np.float32),
        "reference": np.asarray([7] * row, np.int32),
        "reference_lengths": np.asarray([row], np.int32),
        "log_step": np.asarray([step], np.int64),
    }


class Remembering:
    """Two prompts of two texts at every step, told in a shuffled order; remembers what it was asked."""

    def __init__(self, order: int = 0):
        self.asked: list[tuple[int, int]] = []
        self._order = order

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        raise NotImplementedError

    def recall(self, through: int, capacity: int) -> Columns:
        self.asked.append((through, capacity))
        first = max(1, through + 1 - -(-capacity // 4))
        texts = [text(s, r, i) for s in range(first, through + 1) for r in (1, 2) for i in (0, 1)]
        texts = [texts[i] for i in np.random.default_rng(self._order).permutation(len(texts))]
        return {name: np.concatenate([t[name] for t in texts]) for name in (texts[0] if texts else ())}


def luck(step: int) -> list[float]:
    """u of the bundle's rows at a step."""
    return [float(np.random.default_rng((4, step, row)).random()) for row in (20, 21, 22)]


def test_rows_in_the_band_are_recalled_new_ones_below_it_written_and_the_others_given() -> None:
    for step in range(4, 30):
        out = ROLLOUT(STAGE(bundle(step), Remembering()), Counting())
        found: list[str] = []
        for tokens, by, row_id in zip(rows(out), out["written_by"].tolist(), out["row_id"].tolist(), strict=True):
            found.append("recalled" if tokens[-1] >= 1000 else "written" if by >= 0 else "given")
            assert (row_id >= 20) == (found[-1] != "recalled")
        pairs = {"recalled": 2, "written": 2, "given": 1}
        expected = ["written" if u < SHARE * FRESH else "recalled" if u < SHARE else "given" for u in luck(step)]
        assert found == [kind for kind in expected for _ in range(pairs[kind])]


def test_a_recalled_row_is_the_one_that_was_written() -> None:
    step = next(s for s in range(4, 40) if all(SHARE * FRESH <= u < SHARE for u in luck(s)[:1]))
    out = STAGE(bundle(step), Remembering())
    (line, other, *_) = lines_of(out)
    (wanted,) = lines_of(text(step - 2, line.row_id, 0))
    assert line.tokens.tolist() == wanted.tokens.tolist() and line.behaviour.tolist() == wanted.behaviour.tolist()
    assert (line.written_by, line.sample, line.finished, len(line.reference)) == (step - 4, 0, True, line.row_id)
    assert (other.row_id, other.sample) == (line.row_id, 1), "texts of one prompt stay together"
    assert STAGE.adds <= set(out)


def test_only_texts_are_recalled_that_were_known_when_the_student_that_is_due_went_out() -> None:
    known = Remembering()
    for step in range(1, 12):
        STAGE(bundle(step), known)
    assert known.asked and all(through >= 1 and capacity == 4 for through, capacity in known.asked)
    assert {through for through, _ in known.asked} <= {step - 2 for step in range(3, 12)}


def test_while_there_are_fewer_than_wanted_the_student_writes() -> None:
    many = replace(STAGE, capacity_rows=4 * 5 + 1)
    for step in range(1, 8):  # at step 7 the log holds 5 steps of 4 texts
        given = bundle(step)
        assert np.array_equal(ROLLOUT(many(given, Remembering()), Counting())["tokens"], ROLLOUT(given, Counting())["tokens"])
    full = [not np.array_equal(many(bundle(step), Remembering())["tokens"], bundle(step)["tokens"]) for step in range(8, 30)]
    assert any(full)


def test_the_same_texts_come_again_whoever_wrote_the_log_down_and_all_of_them_in_time() -> None:
    wide, seen = replace(STAGE, capacity_rows=12), Counter[tuple[int, int]]()
    for step in range(5, 400):
        one, two = (wide(bundle(step), Remembering(order))["tokens"] for order in (0, 1))
        assert np.array_equal(one, two)
        seen.update((step - (t[0] - 1000) // 100, t[0] % 100 // 10) for t in rows(wide(bundle(step), Remembering())) if t[0] >= 1000)
    assert set(seen) == {(age, row) for age in (2, 3, 4) for row in (1, 2)}
    assert max(seen.values()) < 1.6 * min(seen.values())


def test_a_share_that_grows_turns_new_texts_into_recalled_ones_and_never_given_ones() -> None:
    for step in range(4, 20):
        kinds = [
            [w >= 0 for w in ROLLOUT(replace(STAGE, share=constant(share))(bundle(step), Remembering()), Counting())["written_by"]]
            for share in (0.0, 0.5, 1.0)
        ]
        assert kinds[0] == kinds[1] == kinds[2]


def test_held_out_rows_stay_as_they_are() -> None:
    known, given = Remembering(), bundle(0)
    out = STAGE(given, known)
    assert not known.asked and not out["written"].any() and all(np.array_equal(out[name], given[name]) for name in given)


def test_what_a_step_adds_to_the_log_is_what_its_own_student_wrote() -> None:
    for step in range(6, 20):
        given = bundle(step) | {"policy_version": np.asarray([step - 2], np.int64)}
        out = ROLLOUT(STAGE(given, Remembering()), Counting())
        own = [line for line in lines_of(out) if 100 < line.tokens[-1] < 1000]
        assert all(np.array_equal(a, b) for a, b in zip(fresh_rows(out).values(), joined(own).values(), strict=True))


def test_only_who_remembers_can_answer() -> None:
    with pytest.raises(ValueError, match="does not"):
        STAGE(bundle(), Counting())
