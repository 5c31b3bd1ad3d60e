"""The door for curricula: what they need of a recipe and its data, and what the plan says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from orchestrator.curricula import LAG_STEPS, draws
from orchestrator.draws import BY_CHANCE, Draws
from orchestrator.errors import Refusal
from orchestrator.plan import Plan
from orchestrator.plan_text import plan_text
from strategies.curriculum import Curriculum
from strategies.domains import domain_id
from tests.orchestrator.bench import Bench

SHARES = {"type": "shares", "shares": {"code": 3, "prose": 1}}
DDK = {"type": "ddk", "domains": ["code", "prose"]}
WORDS = "some more words of this kind, number {}"


def plain(plan: Plan) -> str:
    """The plan's text without its line breaks."""
    return " ".join(plan_text(plan).split())


def marked(bench: Bench, code: int = 24, prose: int = 12, held_out_rows: int = 12) -> None:
    """Data of two domains, with a score."""
    rows = [{"text": WORDS.format(i), "kind": "code" if i < code else "prose", "hard": i} for i in range(code + prose)]
    bench.recipe["data"] |= {"train": bench.rows(*rows), "domain": "kind", "score": "hard", "held_out_rows": held_out_rows}


def refused(bench: Bench, curriculum: Mapping[str, Any], *overrides: str) -> str:
    bench.recipe["curriculum"] = curriculum
    with pytest.raises(Refusal) as caught:
        bench.plan(*overrides)
    return str(caught.value)


def test_the_plan_says_what_is_drawn_and_how_late_feedback_comes(bench: Bench) -> None:
    marked(bench)
    bench.recipe["curriculum"] = {"mixture": DDK, "order": {"pace": {"ramp": [0.2, 1.0]}}}
    plan = bench.plan("evaluate.every_steps=2")
    text = plain(plan)
    assert "order: the smallest length first; 20% of the rows are open at first, 80% at last" in text
    assert "mixture: code, prose; moved by ddk" in text
    assert f"the rows of step t depend on what was known after step t - {LAG_STEPS + 1}" in text
    assert "mixture begins at code 0.5, prose 0.5" in text
    assert "domains by kind, rows to train on + held out: code" in text
    fresh = plan.freshness(None)
    assert fresh is not None and fresh.staleness == LAG_STEPS and plan.order.draws is not None
    assert plan.order.draws.shares == "mixture" and plan.order.draws.domains == (domain_id("code"), domain_id("prose"))


def test_a_curriculum_that_is_known_before_the_run_waits_for_nobody(bench: Bench) -> None:
    marked(bench)
    bench.recipe["curriculum"] = {"mixture": SHARES, "order": {"by": "column", "descending": True}}
    plan = bench.plan()
    text = plain(plan)
    assert plan.freshness(None) is None and "feedback" not in text
    assert "the largest data.score first" in text and "mixture: code, prose; 75%, 25%" in text
    assert plan.order.draws is not None and plan.order.draws.sort_by == "score" and plan.order.draws.descending


def test_the_control_of_a_mixture_is_the_datas_own_and_that_of_an_order_is_chance(bench: Bench) -> None:
    marked(bench)
    bench.recipe["curriculum"] = {"mixture": DDK, "order": {}}
    plan = bench.plan("curriculum.control=random")
    counts, laid = plan.data.train.domains, plan.order.draws
    assert laid is not None and not isinstance(laid.shares, str) and plan.freshness(None) is None
    assert laid.shares[0].tolist() == pytest.approx([counts["code"] / plan.data.train.rows, counts["prose"] / plan.data.train.rows])
    assert laid.sort_by == BY_CHANCE and np.array_equal(laid.open, bench.plan().order.draws.open)  # type: ignore[union-attr, arg-type]
    assert "as a control" in plain(plan)


def test_schedules_are_tabulated_only_where_they_move(bench: Bench) -> None:
    marked(bench)
    data = bench.plan().data
    moving = {"type": "shares", "shares": {"code": {"ramp": [1, 0], "over_steps": 10}, "prose": 1}}
    for mixture, shape in ((SHARES, (1, 2)), (moving, (100, 2))):
        laid = draws(Curriculum.model_validate({"mixture": mixture, "order": {"pace": 0.5}}), data, 100)
        assert isinstance(laid, Draws) and not isinstance(laid.shares, str) and laid.shares.shape == shape
        assert not isinstance(laid.open, str) and laid.open is not None and laid.open.tolist() == [0.5]
        assert laid.shares_at(100, {})[1] == (0.25 if mixture is SHARES else 1.0)


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"type": "ddk", "domains": ["cod", "prose"]}, "Did you mean 'code'?"),
        ({"type": "shares", "shares": {"code": 1, "maths": 1}}, "domains of the data: code ("),
        ({"type": "ddk", "domains": ["code", "code"]}, "each domain once"),
        ({"type": "ddk", "domains": ["code", "prose"], "teacher": "other"}, "eval/teacher_cross_entropy/other/code"),
        ({"type": "skills", "domains": ["code", "prose"]}, "rollout/failed/code"),
    ],
)
def test_domains_and_what_moves_them_must_be_there(bench: Bench, mixture: Mapping[str, Any], said: str) -> None:
    marked(bench)
    assert said in refused(bench, {"mixture": mixture})


def test_a_gap_to_a_teacher_of_other_tokens_is_no_gap(bench: Bench) -> None:
    marked(bench)
    bench.recipe["strategy"] = {"type": "alm"}
    bench.recipe["endpoints"]["teacher"]["model"] = str(bench.folder / "foreign")
    assert "losses of the same tokens are compared" in refused(bench, {"mixture": DDK})


def test_a_domain_that_nobody_named_is_refused(bench: Bench) -> None:
    marked(bench)
    bench.recipe["data"]["train"] = bench.rows(
        *[{"text": WORDS.format(i), "kind": ("code", "prose", "maths")[i % 3], "hard": i} for i in range(36)]
    )
    assert "no domain 'maths', of which the data has" in refused(bench, {"mixture": DDK})
    assert "with a weight of 0" in refused(bench, {"mixture": SHARES})


def test_a_domain_without_held_out_rows_cannot_move_a_mixture(bench: Bench) -> None:
    marked(bench, code=34, prose=2, held_out_rows=1)
    assert "the domain 'prose' without held-out rows" in refused(bench, {"mixture": DDK})
    bench.recipe["curriculum"] = {"mixture": SHARES}
    bench.plan()


@pytest.mark.parametrize(
    ("curriculum", "overrides", "said"),
    [
        ({"order": {}}, ["train.batch_tokens=64"], "train.batch_tokens: got 64 with a curriculum"),
        ({"mixture": SHARES}, ["data.domain=null"], "data without domains"),
        ({"order": {"by": "column"}}, ["data.score=null"], "data without a score"),
        ({"order": {}, "lag_steps": 3}, [], "known before the run"),
        ({"order": {"pace": {"patience": 2, "metric": "loss/kl"}}}, [], "Did you mean 'loss/kd'?"),
        ({"order": {"pac": 1}}, [], "Did you mean 'pace'?"),
        ({"order": {"pace": {"patienc": 3}}}, [], "curriculum.order.pace.patience: got nothing"),
        ({"mixture": {"domains": ["code", "prose"]}}, [], "curriculum.mixture: got no type; expected a type"),
        ({"mixture": {"type": "dkd", "domains": ["code", "prose"]}}, [], "Did you mean 'ddk'?"),
    ],
)
def test_what_a_curriculum_cannot_do_is_refused(bench: Bench, curriculum: Mapping[str, Any], overrides: list[str], said: str) -> None:
    marked(bench)
    assert said in refused(bench, curriculum, *overrides)


def test_rows_that_the_student_writes_are_as_old_as_it_is(bench: Bench) -> None:
    marked(bench)
    bench.recipe["strategy"] = {"type": "gkd", "max_new_tokens": 8, "staleness": 1}
    bench.recipe["curriculum"] = {"mixture": DDK}
    fresh = bench.plan("evaluate.every_steps=2").freshness(None)
    assert fresh is not None and fresh.staleness == 1
    assert "the student that writes is 1 steps old" in refused(bench, {"mixture": DDK, "lag_steps": 3}, "evaluate.every_steps=2")


def test_a_weight_of_nothing_and_a_mixture_that_is_never_told_are_warned_of(bench: Bench) -> None:
    marked(bench)
    bench.recipe["curriculum"] = {"mixture": {"type": "shares", "shares": {"code": 1, "prose": 0}}}
    assert any("'prose' has weight 0 throughout" in w for w in bench.plan().warnings)
    bench.recipe["curriculum"] = {"mixture": DDK}
    assert any("set evaluate.every_steps" in w for w in bench.plan().warnings)


def test_sources_by_name_need_no_column(bench: Bench) -> None:
    marked(bench)
    del bench.recipe["data"]["domain"], bench.recipe["data"]["score"]
    rows = bench.recipe["data"]["train"]
    bench.recipe["data"]["train"] = {"code": rows, "prose": str(bench.folder / "rows.jsonl")}
    bench.recipe["curriculum"] = {"mixture": DDK}
    text = plain(bench.plan("evaluate.every_steps=2"))
    assert "domains by source, rows to train on + held out: code" in text and f"{rows}, {bench.folder}/rows.jsonl: " in text


@pytest.mark.parametrize(("by", "endpoint"), [("teacher-loss", "teacher"), ("student-loss", "base")])
def test_losses_that_order_rows_are_a_store_of_their_own(bench: Bench, by: str, endpoint: str) -> None:
    bench.recipe["curriculum"] = {"order": {"by": by}}
    plan = bench.plan("strategy=cross-entropy")
    (filling,) = plan.captures()
    assert (filling.spec.name, filling.stage.endpoint) == (endpoint, endpoint) and set(plan.shares) == {"worker", "reader"}
    assert plan.order.draws is not None and plan.order.draws.sort_by == f"loss-{filling.spec.key.digest}"
    text = plain(plan)
    assert f"the smallest loss of {endpoint} first" in text and ("is used by no stage" in text) == (by == "student-loss")
    assert not bench.plan("strategy=cross-entropy", "curriculum.control=random").captures()


@pytest.mark.parametrize(
    ("order", "overrides", "said"),
    [
        ({"by": "teacher-loss", "teacher": "techer"}, [], "Did you mean 'teacher'?"),
        ({"by": "student-loss"}, ["student.init=random"], "a student of fresh weights"),
        ({"by": "teacher-loss", "teacher": "far"}, ["endpoints.far={engine: fake, vocabulary: 512}"], "the loss of endpoints.far ('fake')"),
    ],
)
def test_losses_that_nobody_can_tell_are_refused(bench: Bench, order: dict[str, str], overrides: list[str], said: str) -> None:
    assert said in refused(bench, {"order": order}, *overrides)
