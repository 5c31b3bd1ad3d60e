"""Spans that cover the same bytes, found from the places where tokens end, and a teacher's answers laid on the student's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from strategies import STRATEGIES
from strategies.aligned import UNTOLD
from strategies.core import Columns, ScoreRequest
from strategies.stages.align import NONE, Align, AlignedTokens, Reading, ScoreAligned, alignments, foreign, spans, taught_spans
from strategies.stages.score import Score

OURS = [["a", "bc", "d", "ef", "g"], ["hi", "j", "kl"]]
THEIRS = [["ab", "c", "d", "e", "fg"], ["h", "ij", "k", "l"]]
"""Two rows, and their spans: (a bc | ab c), (d | d), (ef g | e fg); (hi j | h ij), (kl | k l)."""


def ends(rows: list[list[str]]) -> np.ndarray:
    return np.cumsum([len(t) for row in rows for t in row])


def reading(**changed: object) -> Reading:
    """The rows above as a reader shows them; a teacher's id is its number in `THEIRS`, from 10."""
    texts = [t for row in THEIRS for t in row]
    given = {
        "tokens": np.arange(10, 10 + len(texts), dtype=np.int32),
        "lengths": np.asarray([len(r) for r in THEIRS], dtype=np.int32),
        "ours": ends(OURS),
        "theirs": ends(THEIRS),
        "cuts": np.asarray([7, 12]),
    }
    return Reading(**{**given, **changed})  # type: ignore[arg-type]


def bundle(mask: list[int] | None = None) -> Columns:
    return {
        "tokens": np.arange(8, dtype=np.int32),
        "lengths": np.asarray([5, 3], np.int32),
        "loss_mask": np.asarray([0, 1, 1, 1, 1, 0, 1, 1] if mask is None else mask, np.uint8),
        "row_id": np.arange(2),
    }


@dataclass(frozen=True)
class Given:
    """A reader that shows what it was given."""

    shown: Reading

    def read(self, columns: Columns) -> Reading:
        return self.shown


def aligned(mask: list[int] | None = None, **changed: object) -> Columns:
    return Align("far", Given(reading(**changed)))(bundle(mask), None)


def test_spans_are_the_shortest_pieces_whose_ends_both_have() -> None:
    found = spans(ends(OURS), ends(THEIRS), np.asarray([0, 7, 12]))
    assert found.ours.tolist() == [0, 0, 1, 2, 2, 3, 3, 4]
    assert found.theirs.tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert found.count == 5


@pytest.mark.parametrize("seed", range(30))
def test_spans_of_random_cuts_cover_the_same_places_and_no_shorter_ones_do(seed: int) -> None:
    draw = np.random.default_rng(seed)
    ours, theirs = (np.union1d(np.flatnonzero(draw.random(60) < share) + 1, [60]) for share in (0.5, 0.3))
    found = spans(ours, theirs, np.asarray([60]))
    common = sorted(set(ours.tolist()) & set(theirs.tolist()))
    assert found.count == len(common)
    assert [ours[found.ours == k].max() for k in range(found.count)] == common
    assert [theirs[found.theirs == k].max() for k in range(found.count)] == common
    assert (np.diff(found.ours) >= 0).all() and (np.diff(found.theirs) >= 0).all()


def test_what_ends_on_one_side_alone_aligns_with_nothing() -> None:
    cut_short = reading(theirs=np.asarray([2, 3, 4, 5, 6, 8, 10, 11, NONE]))  # neither row is read to its end
    found = spans(cut_short.ours, cut_short.theirs, cut_short.cuts)
    assert found.ours.tolist() == [0, 0, 1, 2, NONE, 3, 3, NONE]
    assert found.theirs.tolist() == [0, 0, 1, 2, 2, 3, 3, NONE, NONE]


def test_a_cut_inside_a_token_leaves_no_span_whose_sides_begin_apart() -> None:
    found = spans(np.asarray([3, 6]), np.asarray([6]), np.asarray([1, 6]))  # the teacher reads from place 1 on
    assert found.count == 0
    found = spans(np.asarray([1, 3, 6]), np.asarray([3, 6]), np.asarray([0, 1, 6]))
    assert found.ours.tolist() == [NONE, 0, 1] and found.theirs.tolist() == [0, 1]


def test_tokens_that_share_a_character_are_one_place_of_the_teacher() -> None:
    found = spans(np.asarray([1, 4, 5]), np.asarray([1, 4, 4, 4, 5]), np.asarray([5]))
    assert found.theirs.tolist() == [0, 1, 1, 1, 2]


def test_a_special_token_without_a_counterpart_aligns_with_nothing_and_parts_the_text() -> None:
    found = spans(np.asarray([2, 3, 5]), np.asarray([2, 5]), np.asarray([2, 3, 5]))  # place 2 to 3 is a special one of the student
    assert found.ours.tolist() == [0, NONE, 1] and found.theirs.tolist() == [0, 1]


def test_spans_count_where_all_of_them_is_learnt_and_predicted() -> None:
    found = taught_spans(reading(), bundle()["loss_mask"])
    assert found.ours.tolist() == [NONE, NONE, 0, 1, 1, NONE, NONE, 2]
    assert found.theirs.tolist() == [NONE, NONE, 0, 1, 1, NONE, NONE, 2, 2]
    prompted = taught_spans(reading(), np.asarray([1, 1, 0, 0, 1, 1, 1, 1]))
    assert prompted.ours.tolist() == [NONE] * 7 + [0], "first tokens of the teacher's rows are predicted by nobody"
    behind = reading(
        lengths=np.asarray([6, 5], np.int32), tokens=np.arange(11), theirs=np.asarray([NONE, 2, 3, 4, 5, 7, NONE, 8, 10, 11, 12])
    )
    assert taught_spans(behind, np.ones(8)).ours.tolist() == [0, 0, 1, 2, 2, 3, 3, 4], "behind a BOS of its own they are"


def test_the_stage_shows_the_teacher_its_tokens_and_numbers_spans_alike_on_both_sides() -> None:
    out = aligned()
    assert out["far/span"].tolist() == [NONE, 0, 1, 1, NONE, 2] and out["far/span"].dtype == np.int32
    assert out["far/loss_mask"].tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert out["far/theirs"].tolist() == [0, 1, 1, 2, 2]
    assert out["count/unaligned/far"].tolist() == [2.0]
    assert set(out) - set(bundle()) == Align("far").adds
    with pytest.raises(ValueError, match="tokenizers"):
        Align("far", of="teacher")(bundle(), None)


@pytest.mark.parametrize(
    ("which", "counted"),
    [("all", [0, 1, 1, 1, 0, 1]), ("first", [0, 1, 1, 0, 0, 1]), ("one", [0, 1, 0, 0, 0, 0]), ("several", [0, 0, 1, 1, 0, 1])],
)
def test_a_term_counts_on_chosen_tokens_of_spans(which: str, counted: list[int]) -> None:
    stage = AlignedTokens("kd", "far", which)  # type: ignore[arg-type]
    assert stage(aligned(), None)["weights/kd"].tolist() == counted
    halved = stage({**aligned(), "weights/kd": np.full(6, 0.5, np.float32)}, None)
    assert halved["weights/kd"].tolist() == [0.5 * c for c in counted]
    assert stage(aligned([0] * 8), None)["weights/kd"].tolist() == []
    assert stage(aligned(theirs=np.full(9, NONE)), None)["weights/kd"].tolist() == [0.0] * 6


class Teacher:
    """Says of a token -1/id, and keeps the ids of the token and of the next one."""

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        self.seen = columns
        own = columns["tokens"][columns["loss_mask"] != 0]
        kept = np.stack([own, own + 1], -1).ravel().astype(np.int32) if request.kind == "topk" else np.zeros(0, np.int32)
        more = {"ids": kept, "logprobs": -1.0 / kept.astype(np.float32)} if request.kind == "topk" else {}
        if request.kind == "among":
            more = {"among": (-2.0 / own).astype(np.float32)}
        return {"logprob": (-1.0 / own).astype(np.float32), "dropped_mass": np.zeros(1, np.float32), **more}


def test_answers_about_a_span_are_summed_and_laid_on_its_first_token() -> None:
    teacher, given = Teacher(), aligned()
    out = ScoreAligned("far", "far", ScoreRequest("per-token"))(given, teacher)
    assert teacher.seen["tokens"].tolist() == list(range(10, 19)) and teacher.seen["lengths"].tolist() == [5, 4]
    want = [0, -1 / 12, -1 / 13 - 1 / 14, 0, 0, -1 / 17 - 1 / 18]
    np.testing.assert_allclose(out["far/logprob"], want, rtol=1e-6)
    assert set(out) == {*bundle(), "far/span", "far/logprob", "far/seconds", "far/dropped_mass", "count/unaligned/far"}
    assert all((out[n] == bundle()[n]).all() for n in bundle())


def test_next_tokens_are_laid_on_first_tokens_as_the_students_ids_where_it_has_the_same_bytes() -> None:
    shared = (NONE,) * 12 + (3, NONE, 5)
    out = ScoreAligned("far", "far", ScoreRequest("topk", top_k=2), shared)(aligned(), Teacher())
    assert out["far/ids"].reshape(-1, 2).tolist() == [[NONE] * 2, [3, NONE], [NONE, 5], [NONE] * 2, [NONE] * 2, [NONE] * 2]
    np.testing.assert_allclose(out["far/logprobs"].reshape(-1, 2)[1:3], [[-1 / 12, -1 / 13], [-1 / 13, -1 / 14]], rtol=1e-6)
    assert not out["far/logprobs"].reshape(-1, 2)[[0, 3, 4]].any()


def test_units_behind_spans_are_asked_about_where_both_have_a_token_there() -> None:
    teacher, given = Teacher(), aligned([0, 1, 1, 1, 1, 0, 1, 1])
    stage = ScoreAligned("far", "far", ScoreRequest("among"), units=((7,), (3, 4)))
    out = stage(given, teacher)
    assert teacher.seen["wanted"].tolist() == [3, 4]
    assert teacher.seen["loss_mask"].tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1], "the token behind every span is asked about already"
    want = [0, -1 / 12, -1 / 13 - 1 / 14, 0, 0, -1 / 17 - 1 / 18]
    np.testing.assert_allclose(out["far/logprob"], want, rtol=1e-6)
    np.testing.assert_allclose(out["far/begins"], [UNTOLD, UNTOLD, -2 / 13, UNTOLD, UNTOLD, UNTOLD], rtol=1e-6)
    assert stage.adds <= set(out) and all((out[n] == bundle()[n]).all() for n in bundle()) and "wanted" not in out
    nothing = stage(aligned([0, 1, 0, 0, 0, 0, 0, 0]), Teacher())
    assert nothing["far/begins"].tolist() == [UNTOLD]


def test_a_token_behind_a_span_that_is_in_none_is_asked_about_too() -> None:
    # the student's last token of the first row is not learnt with all of its span, so the teacher's token behind (d | d) is in none
    teacher = Teacher()
    out = ScoreAligned("far", "far", ScoreRequest("among"))(aligned([0, 0, 1, 1, 0, 0, 1, 1]), teacher)
    assert teacher.seen["loss_mask"].tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(out["far/begins"], [UNTOLD, -2 / 13, UNTOLD, UNTOLD], rtol=1e-6)
    np.testing.assert_allclose(out["far/logprob"], [-1 / 12, 0, 0, -1 / 17 - 1 / 18], rtol=1e-6)


def test_nothing_aligned_is_an_answer_too() -> None:
    out = ScoreAligned("far", "far", ScoreRequest("topk", top_k=2))(aligned([0, 1, 0, 0, 0, 0, 0, 0]), Teacher())
    assert out["far/logprob"].tolist() == [0.0] and out["far/ids"].tolist() == [NONE] * 2


@pytest.mark.parametrize("name", ["alm", "uld", "gold", "dskd"])
def test_the_strategies_ask_their_teacher_about_its_own_tokens_alone(name: str) -> None:
    built = STRATEGIES[name].model_validate({"type": name}).build()
    assert foreign(built.stages) == {"teacher"} and [a.of for a in alignments(built.stages)] == ["teacher"]
    on_policy = STRATEGIES[name].model_validate({"type": name, "student_share": 1.0, "base": "teacher"}).build()
    assert type(on_policy.stages[0]).__name__ == "Rollout"
    assert foreign(on_policy.stages) == frozenset(), "who is asked about the student's tokens, too, must share its tokenizer"
    assert foreign((Score("x", "teacher", ScoreRequest("topk")),)) == frozenset()
