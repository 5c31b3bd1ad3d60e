"""Domains: their numbers, and rows that keep theirs through everything that writes, recalls, pairs or mends them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from strategies.core import Columns, Sampling
from strategies.domains import DOMAIN, domain_id
from strategies.schedule import constant
from strategies.stages.repair import Lessons, Repair
from strategies.stages.replay import Replay, fresh_rows
from strategies.stages.rollout import Rollout
from tests.strategies.test_replay import Remembering, text
from tests.strategies.test_rollout import STAGE, Counting, bundle

OF_ROW = {20: domain_id("code"), 21: domain_id("prose"), 22: domain_id("code")}


def with_domains(columns: Columns) -> Columns:
    return columns | {DOMAIN: np.asarray([OF_ROW[r] for r in columns["row_id"].tolist()], np.int64)}


def test_a_number_of_a_name_is_the_same_everywhere() -> None:
    assert domain_id("code") == 549965964439159711
    assert min(map(domain_id, map(str, range(1000)))) >= 0 and max(map(domain_id, map(str, range(1000)))) < 1 << 63


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("paired", [False, True])
def test_a_text_has_the_domain_of_its_prompt(share: float, paired: bool) -> None:
    stage = replace(STAGE, share=constant(1.0 if paired else share), paired=paired)
    out = stage(with_domains(bundle()), Counting())
    assert out[DOMAIN].tolist() == [OF_ROW[r] for r in out["row_id"].tolist()] and out[DOMAIN].dtype == np.int64
    assert DOMAIN not in stage(bundle(), Counting())


def test_a_bundle_whose_prompts_leave_no_room_has_no_rows_and_no_domains() -> None:
    out = replace(STAGE, longest_tokens=1)(with_domains(bundle()), Counting())
    assert len(out["lengths"]) == len(out[DOMAIN]) == 0


class RememberingDomains(Remembering):
    def recall(self, through: int, capacity: int) -> Columns:
        found = super().recall(through, capacity)
        return found | {DOMAIN: found["row_id"] * 1000}


def test_a_recalled_text_has_the_domain_that_it_was_written_with() -> None:
    stage = Replay(Rollout(Sampling(samples=2, max_new_tokens=3, stop=(0,)), longest_tokens=8), constant(1.0), capacity_rows=4)
    out = stage(with_domains(bundle(9)), RememberingDomains())
    assert set(out["row_id"].tolist()) <= {1, 2} and out[DOMAIN].tolist() == (out["row_id"] * 1000).tolist()
    written = STAGE(with_domains(bundle()) | {"policy_version": np.asarray([2], np.int64)}, Counting())
    assert fresh_rows(written)[DOMAIN].tolist() == written[DOMAIN].tolist()
    assert DOMAIN not in fresh_rows(text(3, 1, 0) | {"policy_version": np.asarray([1], np.int64)})


def test_what_is_mended_keeps_its_domain() -> None:
    written = STAGE(with_domains(bundle()), Counting())
    wrong = {"reward": np.zeros(6, np.float32), "judged": np.asarray([1, 0, 0, 1, 1, 1], np.uint8)}
    mended = Repair("teacher", Sampling(max_new_tokens=4))(written | wrong, Counting())
    assert mended["row_id"].tolist() == [20, 21, 22, 22] and mended[DOMAIN].tolist() == [OF_ROW[r] for r in (20, 21, 22, 22)]
    right = {"reward": np.asarray([1, 1, 0, 1], np.float32), "judged": np.ones(4, np.uint8)}
    lessons = Lessons("combine")(mended | right, None)
    assert lessons["row_id"].tolist() == [20, 20, 21, 21, 22, 22] and lessons[DOMAIN].tolist() == [
        OF_ROW[r] for r in (20, 20, 21, 21, 22, 22)
    ]
