"""The door for runs in which the student writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.comparison import teacher_rows
from orchestrator.errors import Refusal
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_text
from tests.orchestrator.bench import Bench

WRITES = ("strategy=gkd", "strategy.max_new_tokens=16")


def test_the_plan_says_who_writes_and_how_old_it_is(bench: Bench) -> None:
    plan = bench.plan(*WRITES, "strategy.staleness=1", "endpoints.student={actors: 2}")
    said = " ".join(plan_text(plan).split())
    assert "Rollout(student) -> Score(teacher)" in said
    assert "up to 16 tokens after each prompt, exactly 1 steps behind" in said
    assert "student 2 x" in said and "student (transformers, 2 actors, writes with the weights in training)" in said
    assert "weight 0 throughout" not in said
    (stage, *_) = plan.strategy.stages
    assert stage.sampling.stop and stage.longest_tokens == 64  # type: ignore[attr-defined]


def test_longer_and_more_rows_are_held_than_the_data_has(bench: Bench) -> None:
    def tokens(*overrides: str) -> int:
        plan = bench.plan(*WRITES, *overrides)
        return next(m for m in plan.memory if m.role == "worker").parts["bundles"]

    assert tokens("strategy.samples=4") > 2 * tokens()


def test_whoever_writes_is_no_teacher_in_the_closing_comparison(bench: Bench, tmp_path: Path) -> None:
    rows = teacher_rows(bench.plan(*WRITES), {}, Ledger.of(tmp_path))
    assert [row.who for row in rows] == ["teacher"]


def test_a_base_is_asked_and_neither_learnt_from_nor_measured_on_held_out_rows(bench: Bench) -> None:
    plan = bench.plan(*WRITES, "strategy.base=first", f"endpoints.first.model={bench.folder / 'student'}")
    assert "Rollout(student) -> Score(teacher) -> Score(first)" in " ".join(plan_text(plan).split())
    assert plan.strategy.base == "first" and set(plan.measured) == {"teacher"} and "first" in plan.shares
    assert not any("'first'" in w for w in plan.warnings)


def test_a_strategy_whose_base_nobody_asks_is_refused(bench: Bench) -> None:
    strategy = bench.plan(*WRITES).strategy
    said = bench.refusal_of(replace(strategy, base="first"))
    assert "the base 'first', of which no stage adds log-probabilities" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("strategy.max_new_tokens=64",), ["data.max_length_tokens", "64 new tokens", "lower strategy.max_new_tokens"]),
        (("signals=store",), ["signals.mode", "'store'", "signals=live"]),
        (("strategy=opd", "strategy.sample_temperature=0.7"), ["sample_temperature 1"]),
        (("strategy.base=student",), ["strategy: base", "stay as they are", "endpoints.first.model"]),
        (("strategy.base=teachr",), ["the endpoint 'teachr'", "Did you mean 'teacher'"]),
    ],
)
def test_what_cannot_be_written_is_refused(bench: Bench, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        bench.plan(*WRITES, *overrides)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)
