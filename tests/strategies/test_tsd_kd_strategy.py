"""TSD-KD as a whole: its three terms as in the paper."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from strategies.core import Progress, Term
from strategies.objectives.mixtures import JSD
from strategies.objectives.token_weighting import SelectedTokensAbsolute
from strategies.objectives.tsd_kd import Entropy, PlackettLuce
from strategies.stages.rollout import Rollout
from strategies.stages.score import Score
from strategies.tsd_kd import TokenSelectiveDualKD

START = Progress(0, 10)


def terms(**settings: Any) -> dict[str, Term]:
    found = TokenSelectiveDualKD(**settings).build().updates[0].terms
    return {t.name: t for t in found if isinstance(t, Term)}


def test_the_terms_are_those_of_the_paper() -> None:
    direct = SelectedTokensAbsolute(divergence=JSD(beta=0.9, rescale=False), by="entropy-gap", keep="above", threshold=0.0, softness=1.0)
    found = {name: (t.objective, t.scale(START), t.signal) for name, t in terms().items()}
    assert found == {
        "direct": (direct, 1.0, "teacher"),
        "indirect": (PlackettLuce(candidates=10, entropy_share=0.1), 0.1, "teacher"),
        "entropy": (Entropy(quantile=0.1), 1.0, None),
    }


def test_the_student_writes_all_rows_and_the_teacher_gives_all_it_knows() -> None:
    rollout, score = TokenSelectiveDualKD().build().stages
    assert isinstance(rollout, Rollout) and rollout.share(START) == 1.0
    assert isinstance(score, Score) and score.request.kind == "hidden"


def test_a_term_that_weighs_nothing_is_left_out() -> None:
    assert list(terms(entropy_weight=0)) == ["direct", "indirect"]
    assert list(terms(indirect_weight={"ramp": [0.0, 0.1]})) == ["direct", "indirect", "entropy"]


def test_a_ranking_of_tokens_that_the_teacher_did_not_keep_is_refused() -> None:
    with pytest.raises(ValidationError, match="'hidden', 'dense'"):
        TokenSelectiveDualKD.model_validate({"take": {"type": "topk"}})


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_beta_at_which_the_divergence_jumps_is_refused(beta: float) -> None:
    with pytest.raises(ValidationError, match="beta"):
        TokenSelectiveDualKD(beta=beta)
