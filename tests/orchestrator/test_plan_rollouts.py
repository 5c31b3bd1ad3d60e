"""The door for runs in which the student writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from orchestrator.comparison import teacher_rows
from orchestrator.config import StudentConfig
from orchestrator.errors import Refusal
from orchestrator.ledger import Totals
from orchestrator.models import load_tokenizer
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


def test_whoever_writes_is_no_teacher_in_the_closing_comparison(bench: Bench) -> None:
    rows = teacher_rows(bench.plan(*WRITES), {}, Totals())
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


def test_an_end_that_the_teacher_never_writes_is_not_rewarded(bench: Bench) -> None:
    settings = bench.folder / "teacher" / "tokenizer_config.json"
    other = bench.copy("teacher", "other")
    (other / "tokenizer_config.json").write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<|im_start|>"}))
    where = f"endpoints.teacher.model={other}"
    with pytest.raises(Refusal, match="never ends a text so"):
        bench.plan("strategy=opd", *WRITES[1:], where)
    assert any("EOS is" in w for w in bench.plan(*WRITES, where).warnings), "a divergence learns the teacher's own end"


def test_the_end_of_a_reference_counts_too_and_a_base_of_its_own_is_planned(bench: Bench) -> None:
    asked = ("strategy=g-opd", *WRITES[1:], f"endpoints.base.model={bench.folder / 'student'}")
    assert "Score(base)" in " ".join(plan_text(bench.plan(*asked)).split())
    settings = bench.folder / "student" / "tokenizer_config.json"
    other = bench.copy("student", "base")
    (other / "tokenizer_config.json").write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<|im_start|>"}))
    with pytest.raises(Refusal, match="'base' never ends a text so"):
        bench.plan(*asked[:2], f"endpoints.base.model={other}")


@pytest.mark.parametrize(
    ("objective", "take", "words"),
    [
        ("plackett-luce", "per-token", "which reads"),
        ("{type: reverse-kl-reward-to-go, importance_cap: 2}", "per-token", "what is known of tokens that a policy wrote"),
    ],
)
def test_an_objective_that_reads_two_things_needs_a_signal_of_both(bench: Bench, objective: str, take: str, words: str) -> None:
    signals = f"{{teacher: {{endpoint: teacher, take: {take}}}}}"
    with pytest.raises(Refusal, match=words):
        bench.plan(f"strategy={{type: terms, signals: {signals}, terms: [{{objective: {objective}}}]}}")


JUDGED = ("strategy={type: kdrl, max_new_tokens: 16, samples: 4}", "endpoints.verifier={engine: verifier, kind: exact}")


def test_a_verifier_reads_with_the_students_tokenizer(bench: Bench) -> None:
    plan = bench.plan(*JUDGED)
    assert "Rollout(student) -> Reward(verifier) -> GroupAdvantage -> Score(teacher)" in " ".join(plan_text(plan).split())
    answering = plan.stream().endpoints["verifier"]
    assert answering.own_tokenizer and load_tokenizer(StudentConfig(model=answering.own_tokenizer)).get_vocab()
    own = bench.plan(*JUDGED, f"endpoints.verifier.tokenizer={bench.folder / 'teacher'}")
    assert own.stream().endpoints["verifier"].own_tokenizer == str(bench.folder / "teacher")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("strategy.verifier=teacher",), ["endpoint 'teacher'", "'transformers'", "one that judges", "engine: verifier, kind: math"]),
        (("strategy.teacher=verifier",), ["endpoint 'verifier'", "'verifier'", "one that scores", "endpoints.verifier.model"]),
        (("strategy.verifier=nobody",), ["'nobody', which nothing defines"]),
        (("strategy.samples=1",), ["samples", "greater than or equal to 2"]),
        (("endpoints.verifier.kind=regex",), ["pattern", "regex"]),
    ],
)
def test_who_cannot_judge_is_refused(bench: Bench, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        bench.plan(*JUDGED, *overrides)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


RECALLS = ("strategy=distillm", "strategy.max_new_tokens=16", "evaluate.every_steps=2")


def test_the_plan_says_what_is_recalled_and_what_moves(bench: Bench) -> None:
    plan = bench.plan(*RECALLS, "strategy.replay_rows=24")
    said = " ".join(plan_text(plan).split())
    assert "distillm: Replay(replay) -> Rollout(student) -> Score(teacher) -> train" in said
    assert "0% to 75% of its rows are recalled from the newest 24 texts" in said
    assert "student_share begins at 0 and moves by eval/cross_entropy" in said
    assert not plan.warnings, plan.warnings
    replay, rollout, _ = plan.strategy.stages
    assert replay.rollout is rollout and rollout.longest_tokens == 64  # type: ignore[attr-defined]
    log = plan.endpoints["replay"]
    assert log == plan.sources.answering["replay"] and log.folder == f"{plan.folder.root}/rollouts"  # type: ignore[union-attr]


def test_texts_of_any_length_may_be_recalled(bench: Bench) -> None:
    def worker(*overrides: str) -> int:
        plan = bench.plan(*RECALLS, "strategy.max_new_tokens=2", *overrides)
        return next(m for m in plan.memory if m.role == "worker").parts["bundles"]

    assert worker() > worker("strategy.replay_share=0")


def test_a_share_that_cannot_move_before_the_end_is_warned_of(bench: Bench) -> None:
    assert any("none before the end" in w for w in bench.plan(*RECALLS[:2]).warnings)


@pytest.mark.parametrize(("texts", "few"), [("replay_rows=32", False), ("replay_rows=33", True)])
def test_a_run_too_short_to_recall_anything_is_warned_of(bench: Bench, texts: str, few: bool) -> None:
    plan = bench.plan(*RECALLS, f"strategy.{texts}")
    assert any("nothing is recalled: the whole run has 32 rows" in w for w in plan.warnings) == few


def test_where_nobody_writes_a_store_may_answer(bench: Bench) -> None:
    plan = bench.plan("strategy=taid")
    assert set(plan.endpoints) == {"teacher"} and plan.freshness(None) is None and len(plan.captures()) == 0
    assert "taid begins at 0.3 and moves by loss/kd" in plan_text(plan)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.held_out_rows=0",), ["student_share", "no held-out rows", "data.held_out_rows"]),
        (("strategy.student_share={metric: eval/cross_entrop}",), ["'eval/cross_entrop'", "Did you mean 'eval/cross_entropy'?"]),
        (("endpoints.replay={engine: fake, vocabulary: 512}",), ["endpoints.replay", "the run remembers by itself"]),
        (("endpoints.teacher={engine: replay}",), ["endpoints.teacher", "engine 'replay'", "scores"]),
        (("endpoints.replay={engine: replay, folder: elsewhere}",), ["endpoints.replay", "the run remembers by itself"]),
        (("strategy.student_share={rise: 0.1, larger: 1}",), ["student_share"]),
    ],
)
def test_a_memory_that_cannot_work_is_refused(bench: Bench, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        bench.plan(*RECALLS, *overrides)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({"type": "gkd", "student_share": {"metric": "loss/kd"}}, ["student_share", "metric"]),
        ({"type": "personalised", "replay_share": 0.5}, ["replay_share"]),
        ({"type": "sdft", "teacher": "student"}, ["another name than 'student'"]),
        ({"type": "opsd", "base": "self"}, ["another base than the teacher"]),
    ],
)
def test_what_a_strategy_cannot_honour_is_refused(bench: Bench, strategy: dict[str, object], words: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        bench.plan(f"strategy={json.dumps(strategy)}")
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("kind", ["opd", "minillm"])
def test_a_student_that_writes_nothing_is_no_mistake(bench: Bench, kind: str) -> None:
    plan = bench.plan(f"strategy={kind}", "strategy.max_new_tokens=16", "strategy.student_share=0")
    assert "Rollout(student)" in plan_text(plan)


def test_a_teacher_that_nobody_publishes_to_does_not_follow(bench: Bench) -> None:
    with pytest.raises(Refusal, match="its weights would stay random"):
        bench.plan(*WRITES, "endpoints.teacher.follows_student=true")
