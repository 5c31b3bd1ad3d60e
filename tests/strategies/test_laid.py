"""A teacher's own tokens on the places of the student's: nothing is lost, and micro-batches bring each row its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.microbatch import cut
from strategies.aligned import STATES, UNTOLD, AlignedStates, Ends
from strategies.core import Columns, ScoreRequest
from strategies.head import Head
from strategies.sources import ForeignStates, scored_columns
from strategies.stages.align import NONE, Align, Reading, ScoreAligned
from strategies.stages.laid import laid_begins, places
from strategies.taps import OUTPUT

WIDTH = 3
OURS, THEIRS = [[2, 4, 5], [1, 2, 3], [6, 7]], [[1, 2, 3, 4, 5], [3], [2, 4, 5, 6, 7]]
"""Bytes after which tokens end in three rows of 5, 3 and 7 bytes; the student's first token of each is not learnt."""


class Given:
    def read(self, columns: Columns) -> Reading:
        """Teacher's ids are 100, 101, ..., each row behind an opening token of its own, 99."""
        before = np.cumsum([0, 5, 3])
        ends = [[NONE, *(b + at)] for b, at in zip(before, map(np.asarray, THEIRS), strict=True)]
        flat = np.concatenate([np.asarray(r) for r in ends])
        ids = np.where(flat == NONE, 99, 100 + np.cumsum(flat != NONE) - 1)
        ours = np.concatenate([b + np.asarray(r) for b, r in zip(before, OURS, strict=True)])
        return Reading(ids.astype(np.int32), np.asarray([len(r) for r in ends], np.int32), ours, flat, np.asarray([5, 8, 15]))


class Tells:
    """Says of each token `[its id, the id before it, 1]`."""

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        assert request.kind == "hidden"
        at = np.flatnonzero(columns["loss_mask"])
        states = np.stack([columns["tokens"][at], columns["tokens"][at - 1], np.ones(len(at))], -1).astype(np.float32)
        return {"hidden": states.ravel(), "dropped_mass": np.zeros(1, np.float32)}


def bundle(mask: list[int]) -> Columns:
    return {
        "tokens": np.arange(8, dtype=np.int32),
        "lengths": np.asarray([3, 3, 2], np.int32),
        "loss_mask": np.asarray(mask, np.uint8),
        "row_id": np.arange(3),
    }


def scored(mask: list[int]) -> Columns:
    aligned = Align("far", Given())(bundle(mask), None)
    stage = ScoreAligned("far", "far", ScoreRequest("hidden"))
    out = stage(aligned, Tells())
    assert stage.adds <= set(out) and out["tokens"].tolist() == list(range(8))
    return out


def test_tokens_lie_one_after_the_other_on_their_rows_places() -> None:
    at, each = places(np.asarray([2, 0, 1, 3]), np.asarray([1, 0, 3, 4]))
    assert each == 3 and at.tolist() == [0, 6, 7, 8, 9, 10, 11, 12]
    nothing, one = places(np.asarray([2, 0]), np.asarray([0, 0]))
    assert len(nothing) == 0 and one == 1


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
@pytest.mark.parametrize("micro_batch_tokens", [2, 64])
def test_micro_batches_bring_each_row_all_of_the_teachers_tokens(micro_batch_tokens: int, batching: str) -> None:
    columns = scored([0, 1, 1, 0, 1, 1, 0, 1])
    source, ends = ForeignStates("far"), Ends(Head(torch.zeros(200, WIDTH)), torch.zeros(200, WIDTH))
    found = {}
    for micro in cut(columns, scored_columns({"far": source}), batching, micro_batch_tokens, 16):  # type: ignore[arg-type]
        rows = micro.rows.flatten()[micro.index]
        laid = source.read("far", micro.columns, rows, ends)
        assert isinstance(laid, AlignedStates) and laid.reads is not None and laid.labels is not None
        states, of = laid.tokens(OUTPUT), laid.token_rows()
        for label, row, span in zip(micro.labels.tolist(), rows.tolist(), laid.ours.tolist(), strict=True):
            mine = laid.theirs == span
            assert span == NONE or (of[mine] == row).all()
            found[label] = [] if span == NONE else states[mine].tolist()
        assert states[:, 0].tolist() == laid.labels.tolist() and states[:, 1].tolist() == laid.reads.tolist()
    # bytes 3, 4 | 5 of the first row are tokens 102, 103 | 104; the second is one span, not all of which is learnt; 7 of the third is 110
    assert found == {1: [[102, 101, 1], [103, 102, 1]], 2: [[104, 103, 1]], 4: [], 5: [], 7: [[110, 109, 1]]}


def test_where_nothing_aligns_there_are_no_states() -> None:
    columns = scored([0, 0, 0, 0, 1, 1, 0, 0])
    source, ends = ForeignStates("far"), Ends(Head(torch.zeros(200, WIDTH)), torch.zeros(200, WIDTH))
    (micro,) = cut(columns, scored_columns({"far": source}), "bucketed", 64, 16)
    laid = source.read("far", micro.columns, micro.rows.flatten()[micro.index], ends)
    assert laid.tokens(OUTPUT).shape == (0, WIDTH) and laid.ours.tolist() == [NONE, NONE]
    assert set(STATES) <= {name.removeprefix("far/") for name in columns}


def test_a_new_unit_is_told_where_both_go_on_behind_the_span() -> None:
    def rows(lengths: list[int], mask: list[int]) -> Columns:
        return {"tokens": np.zeros(len(mask), np.int32), "lengths": np.asarray(lengths), "loss_mask": np.asarray(mask, np.uint8)}

    begins = np.asarray([-1, -2, -3, -4], np.float32)
    spans, theirs = np.asarray([0, NONE, 1, NONE]), np.asarray([0, 1])
    # the teacher's row is over behind the first span, and what follows is another row's; behind the second one nothing follows at all
    apart = laid_begins(rows([3, 3], [0, 1, 1, 0, 1, 1]), rows([2, 2], [0, 1, 0, 1]), spans, theirs, begins)
    assert apart["begins"].tolist() == [UNTOLD] * 4
    together = laid_begins(rows([3, 3], [0, 1, 1, 0, 1, 1]), rows([3, 1], [0, 1, 0, 1]), spans, theirs, begins)
    assert together["begins"].tolist() == [UNTOLD, -3, UNTOLD, UNTOLD]
