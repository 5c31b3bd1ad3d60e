"""What is kept of a scored block: the answers alone, whatever else a stage says of its rows."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.codecs.exact import ExactCodec
from cluster.engines.fake import FakeEngine
from orchestrator.capture import KeepSignals
from strategies.core import Columns, ScoreRequest, Stage
from strategies.stages.ask import Ask
from strategies.stages.score import Score

VOCABULARY = 16
TOPK = ScoreRequest("topk", top_k=4)


@pytest.mark.parametrize("stage", [Score("a", "a", TOPK), Ask("a", "a", TOPK, domains=("code",))], ids=["score", "ask"])
def test_a_part_holds_the_answers_about_all_rows_of_a_block(stage: Stage) -> None:
    control = {name: np.zeros(1, np.int64) for name in ("step", "steps", "bundle")}
    block: Columns = {
        "tokens": np.arange(6, dtype=np.int32),
        "lengths": np.asarray([4, 2], np.int32),
        "loss_mask": np.asarray([0, 1, 1, 1, 0, 1], np.uint8),
        "row_id": np.arange(2),
        **control,
    }
    scored = stage(block, FakeEngine(VOCABULARY))
    info, _ = KeepSignals("a", TOPK.answers, ExactCodec(TOPK, VOCABULARY))(scored)
    assert (info.rows, info.loss_tokens, info.tokens) == (2, 4, 6)
    assert info.seconds == pytest.approx(float(scored["a/seconds"][0])) and info.cost == 0.0
