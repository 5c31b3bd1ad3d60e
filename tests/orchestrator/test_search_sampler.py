"""Proposals are a function of seed, number and what is known; trials that none beats are the front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.search.book import CONTROL, TRIALS, Book, Trial, abreast, front, ranked
from orchestrator.search.sampler import importance, propose
from orchestrator.search.settings import Objective, SearchConfig

RECIPE = {"student": "some/model", "strategy": "logits", "data": "rows.jsonl"}
SPACE = {
    "train.lr": {"log_uniform": [1e-4, 1.0]},
    "strategy": {"choice": ["logits", {"type": "terms"}]},
    "train.warmup_steps": {"integer": [0, 50]},
}
METRIC = "eval/cross_entropy"


def config(**settings: Any) -> SearchConfig:
    return SearchConfig.model_validate({"space": SPACE, **settings})


def finished(number: int, point: dict[str, Any], value: float, **costs: float) -> Trial:
    return Trial(number, point, "finished", 10, {METRIC: value, **costs})


def tried(search: SearchConfig, count: int) -> list[Trial]:
    """Trials whose loss is the distance of the learning rate from 1e-2, whatever the rest."""
    past: list[Trial] = []
    for number in range(count):
        point = propose(search, RECIPE, number, past, {})
        rate = point["train.lr"]
        assert isinstance(rate, float)
        past.append(finished(number, point, abs(rate - 1e-2)))
    return past


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_same_knowledge_gives_the_same_proposal_and_numbers_differ(sampler: str) -> None:
    search = config(sampler=sampler)
    first, again = tried(search, 6), tried(search, 6)
    assert [t.point for t in first] == [t.point for t in again]
    assert len({t.point["train.lr"] for t in first}) == 6
    assert [t.point for t in tried(config(sampler=sampler, seed=1), 6)] != [t.point for t in first]


def test_tpe_comes_nearer_than_chance() -> None:
    by = {sampler: tried(config(sampler=sampler), 24) for sampler in ("random", "tpe")}
    late = {sampler: sorted(t.metrics[METRIC] for t in trials[12:])[6] for sampler, trials in by.items()}
    assert late["tpe"] < late["random"]


def test_unfinished_failed_and_stopped_trials_are_no_trouble_to_the_sampler() -> None:
    search = config(random_trials=2)
    past = tried(search, 6)
    unknown = [replace(past[2], outcome="running", metrics={}), replace(past[3], outcome="failed", metrics={})]
    mixed = [*past[:2], *unknown, replace(past[4], outcome="paused")]
    assert propose(search, RECIPE, 6, mixed, {4: {2: 1.0, 4: 0.5}})
    several = config(objective=[METRIC, "tokens"], random_trials=2)
    assert propose(several, RECIPE, 2, [replace(t, metrics={**t.metrics, "tokens": 5.0}) for t in mixed], {})


def test_a_grid_goes_in_order() -> None:
    search = SearchConfig.model_validate({"space": {"train.lr": {"choice": [1, 2]}}, "sampler": "grid"})
    assert [propose(search, RECIPE, n, (), {}) for n in range(2)] == [{"train.lr": 1}, {"train.lr": 2}]


def test_what_decides_is_more_important_than_what_does_not() -> None:
    search = config(sampler="random")
    shares = importance(search, tried(search, 24))
    assert max(shares, key=lambda path: shares[path]) == "train.lr"
    assert importance(search, tried(search, 3)) == {}


def test_the_best_and_the_front() -> None:
    objectives = (Objective(), Objective(metric="tokens"))
    trials = [
        finished(0, {}, 2.0, tokens=10),
        finished(1, {}, 1.0, tokens=20),
        finished(2, {}, 1.5, tokens=30),
        replace(finished(3, {}, 0.1, tokens=1), outcome="stopped"),
        finished(CONTROL, {}, 0.1, tokens=1),
    ]
    assert [t.number for t in ranked(trials, objectives[0])] == [1, 2, 0]
    assert [t.number for t in front(trials, objectives)] == [1, 0]
    assert [t.number for t in ranked(trials, Objective(mode="max"))] == [0, 2, 1]


def test_trials_that_ended_at_different_steps_are_compared_at_the_latest_that_all_came_to() -> None:
    trials = [
        finished(0, {}, 1.0),
        replace(finished(1, {}, 3.0), outcome="paused"),
        replace(finished(2, {}, 9.0), outcome="failed"),
        finished(CONTROL, {}, 0.1),
    ]
    curves = {0: {2: 4.0, 4: 2.0, 6: 1.5, 10: 1.0}, 1: {2: 5.0, 4: 3.5, 5: 3.0}}
    same, step = abreast(trials, curves.__getitem__, Objective())
    assert (step, {t.number: t.metrics[METRIC] for t in same}) == (4, {0: 2.0, 1: 3.5})
    same, step = abreast(trials[::2], curves.__getitem__, Objective())
    assert (step, {t.number: t.metrics[METRIC] for t in same}) == (10, {0: 1.0})


def test_a_book_is_read_back_with_a_torn_last_line(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.propose(0, {"strategy": {"type": "terms"}})
    book.propose(1, {"strategy": "logits"})
    book.end(replace(book.trials()[0], outcome="finished", step=4, metrics={METRIC: 1.0, "bad": float("nan")}))
    with (tmp_path / TRIALS).open("a") as file:
        file.write('{"event": "ended", "number": 1')
    again = Book(tmp_path)
    assert again.trials() == [Trial(0, {"strategy": {"type": "terms"}}, "finished", 4, {METRIC: 1.0}), Trial(1, {"strategy": "logits"})]
    again.propose(2, {})
    assert [t.number for t in Book(tmp_path).trials()] == [0, 1, 2]
