"""Domains, conditions and points: what a trial changes in a recipe as it is written."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config import load_job
from orchestrator.dotted import ABSENT, get, put
from orchestrator.errors import Refusal
from orchestrator.search.settings import Domain, Objective
from orchestrator.search.space import applied, grid, ordered, probes, walk

LOGITS = {"type": "logits", "top_k": 8}
TERMS = {"type": "terms", "terms": [{"objective": "forward-kl", "weight": 1.0}, {"objective": "cross-entropy", "weight": 0.1}]}
RECIPE = {"student": "some/model", "strategy": "logits", "data": "rows.jsonl"}


def space(**domains: Any) -> dict[str, Domain]:
    return {path.replace("__", "."): Domain.model_validate(given) for path, given in domains.items()}


@pytest.mark.parametrize(
    ("given", "direction"),
    [
        ({"metric": "eval/cross_entropy"}, "min"),
        ({"metric": "seconds"}, "min"),
        ({"metric": "eval/accuracy"}, "max"),
        ({"metric": "eval/top1_agreement"}, "max"),
        ({"metric": "eval/accuracy", "mode": "min"}, "min"),
    ],
)
def test_what_is_better_is_as_the_metric_means_it_unless_it_is_said(given: dict[str, Any], direction: str) -> None:
    objective = Objective.model_validate(given)
    assert (objective.direction, objective.sign) == (direction, 1.0 if direction == "min" else -1.0)


def test_what_lies_above_is_set_before_what_lies_in_it() -> None:
    given = space(strategy__temperature={"uniform": [1, 4]}, strategy={"choice": [LOGITS, TERMS]})
    assert ordered(given) == ["strategy", "strategy.temperature"]


@pytest.mark.parametrize(("kind", "steps"), [("cosine", 3), ("linear", None)])
def test_a_condition_asks_after_what_it_depends_on(kind: str, steps: int | None) -> None:
    warm_up = {"integer": [0, 9], "when": {"train.lr_schedule": "cosine"}}
    given = space(train__warmup_steps=warm_up, train__lr_schedule={"choice": ["cosine", "linear"]})
    assert walk(given, RECIPE, lambda path, domain: kind if domain.choice else 3).get("train.warmup_steps") == steps


def test_conditions_in_a_circle_are_refused() -> None:
    given = space(train__a={"integer": [0, 1], "when": {"train.b": 1}}, train__b={"integer": [0, 1], "when": {"train.a": 1}})
    with pytest.raises(Refusal, match=r"circle about train\.a, train\.b"):
        ordered(given)


def test_a_condition_on_a_part_of_a_whole_strategy() -> None:
    given = space(strategy={"choice": [LOGITS, TERMS]}, strategy__temperature={"uniform": [1, 4], "when": {"strategy.type": ["logits"]}})
    active = [p.point.get("strategy.temperature") for p in probes(given, RECIPE) if p.path == "strategy"]
    assert active == [1.0, None]
    assert [p.point["strategy.temperature"] for p in probes(given, RECIPE) if p.path == "strategy.temperature"] == [1.0, 4.0]


def test_a_path_that_is_never_set_is_refused() -> None:
    with pytest.raises(Refusal, match="a condition that no trial meets"):
        list(probes(space(train__lr={"uniform": [1, 2], "when": {"train.batching": "nowhere"}}), RECIPE))


def test_items_of_lists_go_by_number_and_others_are_refused() -> None:
    recipe = {**RECIPE, "strategy": TERMS}
    assert applied(recipe, {"strategy.terms.1.weight": 0.5})["strategy"]["terms"][1]["weight"] == 0.5
    assert TERMS["terms"][1]["weight"] == 0.1  # the recipe itself stays
    with pytest.raises(Refusal, match="no item '2' in a list of 2"):
        applied(recipe, {"strategy.terms.2.weight": 0.5})


def test_a_point_goes_into_short_forms() -> None:
    assert applied(RECIPE, {"strategy.top_k": 4})["strategy"] == {"type": "logits", "top_k": 4}
    assert get(RECIPE, ["strategy", "type"]) == "logits"
    assert get(RECIPE, ["train", "lr"]) is ABSENT
    content: dict[str, Any] = {"student": {"model": "a", "lora": {"r": 2}}}
    put(content, ["student"], "b")
    assert content["student"] == {"model": "b", "lora": {"r": 2}}


def test_a_grid_has_every_combination_once_and_conditions_hold() -> None:
    layout = {"choice": ["ddp", "single"], "when": {"train.workers": 2}}
    given = space(train__workers={"integer": [1, 2]}, train__layout=layout)
    two = {"train.workers": 2}
    assert grid(given, RECIPE) == [{"train.workers": 1}, {**two, "train.layout": "ddp"}, {**two, "train.layout": "single"}]
    with pytest.raises(Refusal, match="uniform with sampler: grid"):
        grid(space(train__lr={"uniform": [1, 2]}), RECIPE)


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ({"choice": []}, "at least one value"),
        ({"uniform": [2, 1]}, "below its second"),
        ({"integer": [1, 1]}, "below its second"),
        ({"log_uniform": [0, 1]}, "above 0"),
        ({"uniform": [0, 1], "choice": [1]}, "exactly one of"),
        ({}, "exactly one of"),
        ({"unifrom": [0, 1]}, "Did you mean 'uniform'"),
    ],
)
def test_an_empty_or_malformed_domain_is_refused_by_name(domain: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words) as caught:
        load_job({**RECIPE, "search": {"space": {"train.lr": domain}}})
    assert "search: space.train.lr" in str(caught.value)


def test_a_search_leaves_the_run_of_its_recipe_alone() -> None:
    job = load_job({**RECIPE, "search": {"space": {"train.lr": {"uniform": [1, 2]}}}})
    assert job.run == load_job(RECIPE).run
    assert job.search is not None and job.search.objective[0].metric == "eval/cross_entropy"
