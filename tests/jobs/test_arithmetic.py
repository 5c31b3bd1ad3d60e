"""The arithmetic task: its answers recomputed by reading the stories, its splits apart, and recipes that can be planned on it."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cluster.verifiers.answers import verdict
from jobs import task
from jobs.arithmetic import LARGEST, MOST_EVENTS, Problem, problems
from orchestrator.config import load_job
from orchestrator.plan import make_plan

FIRST = {
    "prompt": "Ben has 45 books, gives 3 to Hugo, loses 12, finds 2. How many now?\n",
    "completion": "45-3=42\n42-12=30\n30+2=32\n#### 32",
}
ADDS, TAKES = ("buys", "finds", "makes", "gets"), ("loses", "sells", "breaks", "gives")


def some(split: str, count: int = 2000, seed: int = 0) -> list[Problem]:
    return list(islice(problems(split, seed), count))  # type: ignore[arg-type]


def told(prompt: str) -> list[int]:
    """What there is after each part of a story, by its words alone."""
    first, *parts = prompt.rpartition(". How many now?\n")[0].split(", ")
    totals = [int(re.search(r"has (\d+) ", first)[1])]  # type: ignore[index]
    for part in parts:
        number = int(re.search(r"\d+", part)[0])  # type: ignore[index]
        if "times as many" in part:
            totals.append(totals[-1] * number)
        else:
            assert part.startswith((*ADDS, *TAKES))
            totals.append(totals[-1] + number if part.startswith(ADDS) else totals[-1] - number)
    return totals


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_working_and_the_answer_are_those_of_the_story(split: str) -> None:
    for problem in some(split):
        totals = told(problem.prompt)
        *steps, answer = problem.completion.split("\n")
        assert answer == f"#### {totals[-1]}"
        assert len(steps) == len(totals) - 1 <= MOST_EVENTS
        for before, after, step in zip(totals, totals[1:], steps, strict=False):
            left, right = step.split("=")
            assert (eval(left), left.startswith(str(before)), int(right)) == (after, True, after)
        assert all(1 <= total <= LARGEST for total in totals)
        assert verdict("numeric", problem.completion, problem.completion).right


def test_no_sum_stands_on_both_sides_or_twice() -> None:
    def core(problem: Problem) -> str:
        return re.sub(r"\n\d+(?=[-+*])", "", problem.completion)

    train, held_out = (some(split, 2500) for split in ("train", "held_out"))
    sides = [{core(problem) for problem in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [2500, 2500]
    assert not {p.sum.key for p in some("train", 2500, seed=1)} & {p.sum.key for p in held_out}


def test_problems_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert some("train", 50) == some("train", 50)
    assert some("train", 50) != some("train", 50, seed=1)
    # of this very version, on any machine: a change of the generator makes other data, and tables that cannot be compared
    assert some("held_out", 1)[0].row == FIRST


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task with few rows and untrained models."""
    home = tmp_path_factory.mktemp("arithmetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "ROWS", {"train": 300, "held_out": 260})
        task.prepare(home)
    for name, shape in task.MODELS.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home / "shapes" / shape))
        model.save_pretrained(home / name)
        AutoTokenizer.from_pretrained(home / "shapes" / shape).save_pretrained(home / name)
    return home


def test_each_digit_is_a_token_of_its_own_and_texts_come_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "shapes" / "student")
    assert len(tokenizer) == AutoConfig.from_pretrained(folder / "shapes" / "student").vocab_size
    digits = [t for t in tokenizer.convert_ids_to_tokens(range(len(tokenizer))) if re.search(r"\d", t)]
    assert sorted(digits) == list("0123456789")
    for problem in some("held_out", 200):
        for text in problem.row.values():
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        assert len(tokenizer(problem.completion)["input_ids"]) < 36


@pytest.mark.parametrize("name", [*task.MODELS, *task.METHODS])
def test_every_recipe_of_the_task_can_be_planned(folder: Path, name: str) -> None:
    more = task.overrides(folder, name, folder / "start") if name in task.METHODS else task.places(folder)
    if name in task.MODELS:
        more.append(f"student.model={folder}/shapes/{task.MODELS[name]}")
    plan = make_plan(load_job(task.recipe(name), more, task.cluster(folder)), name)
    assert plan.steps > 0
    assert plan.data.held_out_by == "source"


def test_recipes_of_methods_differ_in_nothing_that_would_favour_one() -> None:
    jobs = [load_job(task.recipe(method)).run for method in task.METHODS]
    texts = [job.train.batch_rows * getattr(job.strategy, "samples", 1) for job in jobs]
    assert len(set(texts)) == 1
    same = [(job.train.steps, job.train.lr_schedule, job.train.warmup_steps, job.train.weight_decay, job.student, job.data) for job in jobs]
    assert len(set(map(str, same))) == 1


def test_a_recipe_reads_from_the_default_folder_by_itself() -> None:
    assert task.overrides(task.DEFAULT, "logits", task.DEFAULT / "start") == []
    run = load_job(task.recipe("logits")).run
    assert str(run.student.model) == str(task.DEFAULT / "start")
    assert run.data.train == f"{task.DEFAULT}/data/train.jsonl"
