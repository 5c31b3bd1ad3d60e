"""The door of a search: what it lets in, what it says of it, and what it turns away."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ray.tune.execution.placement_groups import resource_dict_to_pg_factory

from cluster.config import OpenAIEndpoint
from cluster.pool import Seat
from orchestrator.config import load_job, to_yaml
from orchestrator.errors import Refusal
from orchestrator.plan import make_plan
from orchestrator.search import door, drive
from orchestrator.search.door import SearchPlan, search_plan
from orchestrator.search.plan_text import search_text
from orchestrator.search.settings import SearchConfig
from orchestrator.search.sharing import seated
from tests.orchestrator.bench import Bench

LR = {"train.lr": {"log_uniform": [1e-4, 1e-2]}}
TEMPERATURE = {"strategy.temperature": {"choice": [1.0, 2.0]}}


def planned(bench: Bench, space: dict[str, Any], **settings: Any) -> SearchPlan:
    return search_plan({**bench.recipe, "search": {"space": space, **settings}}, (), bench.cluster)


def test_the_plan_says_what_is_shared_and_what_a_trial_costs(bench: Bench) -> None:
    plan = planned(bench, {**LR, **TEMPERATURE}, trials=5)
    text = " ".join(search_text(plan).split())
    data = plan.plan.data
    tokens = data.train.tokens + data.held_out.tokens
    assert f"a teacher reads {tokens:,} tokens once; unshared, 5 trials would have it read {5 * tokens:,}" in text
    assert "no teacher is asked or loaded by the trials" in text
    assert "4 steps of 8 rows" in text and "at most 5 trials and a control without a teacher, 1 at once" in text
    assert not bench.storage.joinpath(plan.name).exists()
    warnings = {warning for corner in plan.corners for warning in corner.plan.warnings}
    assert text.count("!") == len(warnings)


def test_what_a_search_writes_down_is_read_back_as_it_was(bench: Bench) -> None:
    space = {"strategy": {"choice": ["cross-entropy", None, {"type": "logits"}]}, "train.lr": {"uniform": [1, 2], "when": {"seed": [0, 1]}}}
    config = SearchConfig.model_validate({"space": space, "objective": [{"metric": "tokens", "mode": "max"}], "scheduler": "asha"})
    written = to_yaml({**bench.recipe, "search": config.model_dump(mode="json", exclude_defaults=True)})
    (bench.storage.parent / "search.yaml").write_text(written)
    assert load_job(bench.storage.parent / "search.yaml").search == config


def test_a_trial_is_the_recipe_with_its_point_and_reads_stores(bench: Bench) -> None:
    run = planned(bench, LR).spec.job({"train.lr": 0.5, "strategy.temperature": 3.0}, "name").run
    assert (run.train.lr, run.name, run.signals.mode, run.baseline) == (0.5, "name", "store", False)
    assert run.data == bench.job().run.data


def test_a_live_teacher_is_loaded_once_for_all_trials(bench: Bench) -> None:
    bench.recipe["signals"] = "live"
    plan = planned(bench, {**LR, "train.batch_rows": {"choice": [8, 16]}})
    (teacher,) = plan.pooled
    assert (teacher.name, teacher.vocabulary, plan.spec.pooled) == ("teacher", plan.plan.vocabulary, ("teacher",))
    assert "teacher answers all trials live and in turns: 1 in memory once" in " ".join(search_text(plan).split())
    alone = make_plan(bench.job(), "alone")
    assert plan.plan.seats == {"teacher": Seat(f"{plan.name}/teacher", plan.plan.name)}
    assert plan.plan.stream().seats == plan.plan.seats and alone.stream().seats == {}
    assert plan.cpus < sum(d.processes * d.share.cpus for d in alone.demands)  # a trial holds nothing of the teacher
    assert plan.memory < sum(m.host * m.processes for m in alone.memory)


def test_the_pool_takes_its_part_of_the_machine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.recipe["signals"] = "live"
    monkeypatch.setattr(door, "machine_cpus", lambda: 1)
    planned(bench, LR)
    with pytest.raises(Refusal, match="at most the 0.5 of this machine beside the teachers that all of them ask"):
        planned(bench, LR, concurrent=2)


def test_a_teacher_that_is_not_the_same_in_all_trials_is_not_shared(bench: Bench) -> None:
    bench.recipe["signals"] = "live"
    plan = planned(bench, {"endpoints.teacher.forward_tokens": {"choice": [1024, 2048]}})
    assert plan.pooled == () and plan.plan.seats == {}
    assert "not shared: teacher, answering every trial live" in " ".join(search_text(plan).split())


def test_whole_strategies_and_conditions_are_let_in(bench: Bench) -> None:
    space = {
        "strategy": {"choice": [{"type": "logits", "top_k": 8}, "cross-entropy"]},
        "strategy.temperature": {"uniform": [1, 4], "when": {"strategy.type": "logits"}},
    }
    plan = planned(bench, space)
    assert [sorted(c.plan.endpoints) for c in plan.corners if c.probe.path == "strategy"] == [["teacher"], []]


def test_a_search_without_a_teacher_has_no_control(bench: Bench) -> None:
    bench.recipe.update(strategy="cross-entropy", endpoints={})
    assert not planned(bench, LR).has_control


def test_threads_are_shared_out_among_trials_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "machine_cpus", lambda: 8)
    monkeypatch.setattr(door.machine, "machine_memory", lambda: 1 << 40)
    spec = planned(bench, LR, concurrent=2).spec
    assert spec.job({}).cluster.resources.worker.threads == 4
    assert spec.home == os.getcwd()


def test_whoever_drives_a_trial_asks_a_head_node_for_no_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")
    asked = resource_dict_to_pg_factory(drive._beside_the_search())
    assert asked.bundles == [{"node:10.0.0.1": 0.001}]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown path": ({"train.lrr": {"uniform": [1, 2]}}, {}, "unknown key 'lrr'.*Did you mean 'lr'"),
    "a wrong type": ({"train.lr": {"choice": [0.1, "much"]}}, {}, r"train.lr: got 'much'"),
    "another type at one end": ({"train.batch_rows": {"integer": [0, 4]}}, {}, r"train.batch_rows: got 0"),
    "a strategy that does not take it": (
        {"strategy": {"choice": ["logits", "cross-entropy"]}, "strategy.temperature": {"uniform": [1, 4]}},
        {},
        "unknown key 'temperature'.*strategy = 'cross-entropy'",
    ),
    "another question": ({"strategy.top_k": {"choice": [4, 8]}}, {}, "values that ask 'teacher' different questions.*rescore: true"),
    "other held-out rows": ({"data.split_seed": {"integer": [0, 1]}}, {}, "values with other held-out rows"),
    "an unknown metric": (LR, {"objective": "eval/cross_entropi"}, "Did you mean 'eval/cross_entropy'"),
    "a training loss": (LR, {"objective": "loss"}, "search.objective: got 'loss'"),
    "a scheduler that never looks": (LR, {"scheduler": "asha"}, "evaluate.every_steps"),
    "a scheduler that looks at costs": (LR, {"scheduler": "asha", "objective": "tokens"}, "a held-out metric for the scheduler"),
    "too many at once": (LR, {"concurrent": 50}, "search.concurrent: got 50 trials of 0.3 logical CPUs"),
    "a range in a grid": (LR, {"sampler": "grid"}, "log_uniform with sampler: grid"),
    "an unknown scheduler": (LR, {"scheduler": "pbtt"}, "'none', 'asha', 'median' or 'pbt'"),
    "no domain at all": ({}, {}, "at least one setting to search"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_words(bench: Bench, case: str) -> None:
    space, settings, words = REFUSED[case]
    with pytest.raises(Refusal, match=words):
        planned(bench, space, **settings)
    assert not list(bench.storage.glob("search*"))


def test_another_question_may_be_declared(bench: Bench) -> None:
    plan = planned(bench, {"strategy.top_k": {"choice": [4, 8], "rescore": True}})
    assert plan.shared == ()
    assert "scored anew for each value" in search_text(plan)


def test_a_name_whose_trials_are_there_is_refused(bench: Bench) -> None:
    """A trial would go on with what lies in its folder."""
    bench.recipe["name"] = "find"
    (bench.storage / "find-better").mkdir(parents=True)
    assert planned(bench, LR).name == "find"
    (bench.storage / "find-000").mkdir()
    with pytest.raises(Refusal, match="find-000, a trial of an earlier search"):
        planned(bench, LR)


def test_a_recipe_without_a_search_is_refused(bench: Bench) -> None:
    with pytest.raises(Refusal, match="no search block"):
        search_plan(bench.recipe, (), bench.cluster)


def asha(bench: Bench) -> None:
    bench.recipe["evaluate"] = {"every_steps": 2}


@pytest.mark.parametrize(("change", "first"), [(asha, 2), (lambda bench: None, 4)])
def test_the_first_look_is_the_first_evaluation(bench: Bench, change: Callable[[Bench], None], first: int) -> None:
    change(bench)
    assert planned(bench, LR).first_evaluation == first


def test_trials_side_by_side_share_what_a_server_takes(bench: Bench) -> None:
    """Each has a connection of its own, and the limit is of all together."""
    plan = planned(bench, LR, concurrent=2).plan
    served = OpenAIEndpoint(engine="openai", base_url="http://server/v1", model="m", vocabulary=8, requests_per_minute=60)
    plan = replace(plan, sources=replace(plan.sources, answering={"served": served}))
    (config,) = seated(plan, (), "find", 4).sources.answering.values()
    assert isinstance(config, OpenAIEndpoint) and config.requests_per_minute == 15
