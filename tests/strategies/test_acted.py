"""What is known of written tokens: the signal's columns, the source that reads them, and who may read the signal."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from strategies.acted import Acted, acted
from strategies.core import Reads
from strategies.head import TokenLogits
from strategies.objectives.sampled import ReverseKLPolicyGradient
from strategies.signals import PerToken
from strategies.sources import TakenActions, TakePerToken, Taught, scored_columns
from tests.strategies.chunking import Tokens, floats, run, same

TOKENS = 5
OUTPUTS = TokenLogits(torch.zeros(TOKENS, 3), torch.zeros(TOKENS, dtype=torch.int64))


def whole() -> Acted:
    """Every column there is, each with other numbers."""
    return Acted(*(torch.arange(TOKENS) + 10.0 * i for i in range(len(fields(Acted)))))


def test_a_piece_has_the_same_tokens_of_every_column() -> None:
    piece = whole().chunk(1, 3)
    for i, field in enumerate(fields(Acted)):
        assert getattr(piece, field.name).tolist() == [10.0 * i + 1, 10.0 * i + 2]
    assert whole().chunk(2, 2).behaviour.shape == (0,)


def test_what_nobody_measured_stays_unknown_and_is_named_when_it_is_read() -> None:
    signal = Acted(torch.zeros(TOKENS), advantage=torch.ones(TOKENS)).chunk(0, 2)
    assert signal.teacher is None and signal.known("advantage", "x").tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="x reads 'reward' .* has behaviour, advantage; expected a source"):
        signal.known("reward", "x")


def test_tokens_that_are_left_out_are_0_in_every_column() -> None:
    live = torch.tensor([True, False, True, False, True])
    broken = Acted(torch.tensor([1.0, -torch.inf, 2.0, torch.nan, 3.0]), reward=torch.full((TOKENS,), torch.nan))
    found = broken.where(live)
    assert found.behaviour.tolist() == [1.0, 0.0, 2.0, 0.0, 3.0]
    assert found.known("reward", "x").isnan().tolist() == live.tolist() and found.teacher is None


def test_it_carries_no_gradient() -> None:
    leaf = torch.zeros(TOKENS, requires_grad=True)
    piece = Acted(leaf, teacher=leaf).chunk(0, 2)
    assert not piece.behaviour.requires_grad and not Acted(leaf, teacher=leaf).label_logprobs(OUTPUTS).requires_grad


@pytest.mark.parametrize(("teacher", "gives"), [(None, {"acted"}), ("judge", {"acted", "label"})])
def test_a_teacher_makes_it_a_signal_of_single_log_probabilities_too(teacher: str | None, gives: set[Reads]) -> None:
    source = TakenActions(teacher=teacher)
    signal = source.read({name: torch.full((TOKENS, 1), -1.5) for name in source.columns("any")})
    assert source.gives == signal.gives == gives and not signal.whole
    if teacher:
        assert signal.label_logprobs(OUTPUTS).tolist() == [-1.5] * TOKENS
    else:
        with pytest.raises(ValueError, match="Acted cannot give what was asked"):
            signal.label_logprobs(OUTPUTS)


def test_estimators_of_single_log_probabilities_read_it_as_they_read_the_teacher_alone() -> None:
    draw = np.random.default_rng(0)
    z_q, labels, log_p = (
        draw.normal(0, 1, (TOKENS, 7)).astype(np.float32),
        draw.integers(0, 7, TOKENS),
        floats(-draw.exponential(2, TOKENS)),
    )
    objective = ReverseKLPolicyGradient()
    same(run(objective, z_q, Tokens(labels, Acted(torch.zeros(TOKENS), log_p))), run(objective, z_q, Tokens(labels, PerToken(log_p))))


def test_the_source_reads_what_it_says_from_the_bundle_s_own_columns_and_from_other_signals() -> None:
    source = TakenActions(teacher="judge", reference="start", outcome=True)
    names = ("behaviour", "judge/logprob", "start/logprob", "advantage", "token_reward", "group_failed")
    assert source.columns("whatever") == names
    signal = source.read({name: torch.full((TOKENS, 1), float(i), dtype=torch.float64) for i, name in enumerate(names)})
    columns = [getattr(signal, f.name) for f in fields(Acted)]
    assert [c.tolist() for c in columns] == [[float(i)] * TOKENS for i in range(len(names))]
    assert {c.dtype for c in columns} == {torch.float32}
    assert TakenActions().columns("whatever") == ("behaviour",)


def test_a_column_that_two_signals_are_made_of_is_carried_once() -> None:
    sources = {"judge": Taught(TakePerToken(), endpoint="judge"), "acts": TakenActions(teacher="judge")}
    assert scored_columns(sources) == ("judge/logprob", "behaviour")


def test_another_signal_is_not_taken_for_it() -> None:
    with pytest.raises(ValueError, match=r"x cannot read the signal PerToken; expected .* policy wrote \(Acted\)"):
        acted(PerToken(torch.zeros(TOKENS)), "x")
    with pytest.raises(ValueError, match="x compares with a teacher, and its term names no signal"):
        acted(None, "x")
