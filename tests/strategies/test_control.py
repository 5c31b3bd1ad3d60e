"""Controllers against the recurrences of their papers, and that states are all they remember."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from strategies.adakd import TokenAdaptiveKD
from strategies.control import AdaptiveShare, Controlled, begun, told
from strategies.core import Progress, TwoPass
from strategies.distillm import DistiLLM
from strategies.head import TokenBatch
from strategies.objectives.adakd import LATF, AdaKD, LATFController, LATFState, latf_update
from strategies.objectives.mixtures import SkewKL, SkewReverseKL
from strategies.objectives.taid import TaidController, TaidPace
from strategies.on_policy import GKD
from strategies.stages.replay import Replay
from strategies.stages.rollout import Rollout
from strategies.stages.score import Score
from strategies.taid import TAID
from tests.strategies import reference_divergences as ref


def distillm_phi(losses: list[float], phi: float, tolerance: float) -> list[float]:
    """phi += 0.1, at most 1, whenever the validation loss >= previous + tolerance; then previous <- current."""
    found, previous = [], losses[0]
    for loss in losses:
        if loss >= previous + tolerance and found:
            phi, previous = min(1.0, phi + 0.1), loss
        found.append(phi)
    return found


@pytest.mark.parametrize("tolerance", [0.1, 0.0, -0.3])
@pytest.mark.parametrize("seed", range(3))
def test_the_share_follows_the_papers_rule(seed: int, tolerance: float) -> None:
    losses = (3 + np.cumsum(np.random.default_rng(seed).normal(0.03, 0.2, 80))).tolist()
    share = AdaptiveShare(start=0.05, tolerance=tolerance)
    state, found = share.begin(), []
    for loss in losses:
        state = json.loads(json.dumps(dict(share.after_evaluation(state, {"eval/cross_entropy": loss}))))
        state = share.after_step(state, {"loss": 0.0}, Progress(0, 1))
        found.append(share.value(state))
    assert found == pytest.approx(distillm_phi(losses, 0.05, tolerance), abs=1e-12)
    assert found[0] == 0.05 and found[-1] > 0.2


def test_a_loss_that_is_no_number_moves_nothing() -> None:
    share = AdaptiveShare()
    state = share.after_evaluation(share.begin(), {"eval/cross_entropy": 2.0})
    assert share.after_evaluation(state, {"eval/cross_entropy": float("nan")}) == state


def test_taids_pace_is_its_recurrence_with_nothing_but_its_state() -> None:
    losses = (5 * np.exp(-np.arange(60) / 20) + np.random.default_rng(1).random(60)).tolist()
    controller = TaidController(TaidPace(start=0.2, end=0.95, rate=0.05, inertia=0.9), "kd")
    state, found = controller.begin(), []
    assert controller.value(state) == 0.2
    for step, loss in enumerate(losses):
        told_of = {"loss/kd": loss, "loss": 99.0}
        state = json.loads(json.dumps(dict(controller.after_step(state, told_of, Progress(step, len(losses))))))
        assert controller.after_evaluation(state, {"eval/cross_entropy": 9.0}) == state
        found.append(controller.value(state))
    np.testing.assert_allclose(found, ref.taid_shares(losses, 0.2, 0.95, 0.05, 0.9), rtol=1e-12)


def test_latf_is_its_update_with_nothing_but_its_state() -> None:
    losses = (5 * np.exp(-np.arange(60) / 20) + np.random.default_rng(1).random(60)).tolist()
    rule = LATF(tolerance=0.02, step=0.1, decay=0.5, warmup_updates=3, smallest=0.4)
    controller, known = LATFController(rule, "kd"), LATFState()
    state, found = controller.begin(), []
    assert controller.value(state) == 1.0
    for step, loss in enumerate(losses):
        told_of = {"loss/kd": loss, "loss": 99.0}
        state = json.loads(json.dumps(dict(controller.after_step(state, told_of, Progress(step, len(losses))))))
        known = latf_update(known, loss, rule)
        found.append(controller.value(state))
        assert found[-1] == known.share
    assert found[3] == 1.0 and min(found) == 0.4


def test_adakd_keeps_the_share_that_the_loss_moved() -> None:
    strategy = TokenAdaptiveKD(strength=0.2).build()
    assert [type(s) for s in strategy.stages] == [Score] and begun(strategy.controllers) == {"kept_share": 1.0}
    (term,) = strategy.updates[0].terms
    assert isinstance(term.objective, TwoPass) and isinstance(term.objective, AdaKD) and term.objective.strength == 0.2
    surveyed, weights = torch.tensor([[0.1], [0.4], [0.3], [0.2]]), torch.ones(4)
    batch = TokenBatch(torch.zeros(4, dtype=torch.int64), {}, {"kd": weights})
    kept = term.objective.settle(surveyed, batch, weights, Progress(0, 1, {"kept_share": 0.5}))[:, 0]
    assert kept.tolist() == [0.0, 2.0, 2.0, 0.0]
    with pytest.raises(ValidationError, match="tempered one by one"):
        TokenAdaptiveKD.model_validate({"take": {"type": "topk", "tail": "drop"}})


def test_values_come_by_name() -> None:
    assert Controlled("a")(Progress(0, 1, {"a": 0.25, "b": 1.0})) == 0.25
    columns = {"control/a": np.asarray([0.1]), "step": np.asarray([3]), "control/b": np.asarray([2.0])}
    assert told(columns) == {"a": 0.1, "b": 2.0}
    assert begun({"a": AdaptiveShare(start=0.5)}) == {"a": 0.5}


def test_distillm_is_a_growing_share_most_of_it_recalled() -> None:
    strategy = DistiLLM().build()
    replay, rollout, score = strategy.stages
    assert isinstance(replay, Replay) and isinstance(rollout, Rollout) and isinstance(score, Score)
    assert replay.rollout is rollout and replay.capacity_rows == 1000
    assert [replay.share(Progress(n, 10)) for n in (0, 5, 10)] == [0, 0.5, 1]
    assert begun(strategy.controllers) == {"student_share": 0.0}
    assert rollout.share(Progress(3, 10, {"student_share": 0.4})) == 0.4
    assert [(t.objective, t.scale(Progress(0, 1))) for t in strategy.updates[0].terms] == [(SkewKL(skew=0.1), 1.0)]


def test_without_a_share_distillm_is_the_off_policy_skew() -> None:
    strategy = DistiLLM(student_share=0.0, divergence="skew-reverse-kl", ce_weight=0.5).build()
    assert [type(s) for s in strategy.stages] == [Score] and not strategy.controllers
    kd, ce = strategy.updates[0].terms
    assert kd.objective == SkewReverseKL(skew=0.1) and ce.scale(Progress(0, 1)) == 0.5


def test_taid_learns_the_datas_text_unless_told_otherwise() -> None:
    strategy = TAID(pace=TaidPace(start=0.2)).build()
    assert [type(s) for s in strategy.stages] == [Score] and begun(strategy.controllers) == {"taid": 0.2}
    (term,) = strategy.updates[0].terms
    assert term.objective.share(Progress(0, 1, {"taid": 0.7})) == 0.7  # type: ignore[union-attr]
    both = TAID.model_validate({"student_share": {"rise": 0.2}}).build()
    assert [type(s) for s in both.stages] == [Rollout, Score] and set(both.controllers) == {"taid", "student_share"}


@pytest.mark.parametrize("share", [{"rise": 0.1, "tolerance": 0.0}, {"steps": [[0, 0.0], [5, 1.0]]}, {"ramp": [0, 1]}, 0.5])
def test_any_strategy_in_which_the_student_writes_takes_any_share_and_recalls(share: object) -> None:
    strategy = GKD.model_validate({"student_share": share, "replay_share": 0.5, "replay_rows": 7}).build()
    assert [type(s) for s in strategy.stages] == [Replay, Rollout, Score]
    assert bool(strategy.controllers) == ("rise" in str(share))


def test_no_more_than_all_rows_are_recalled() -> None:
    with pytest.raises(ValidationError, match="from 0 to 1"):
        GKD(replay_share=1.5)
