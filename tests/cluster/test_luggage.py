"""Words of a command mean elsewhere what they mean here."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.luggage import Luggage
from cluster.package import Tree


@pytest.fixture
def luggage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Luggage:
    """Of a project with `data/rows.jsonl` in the tree, and `runs/teacher`, which is ignored."""
    root = tmp_path / "project"
    for name in ("data/rows.jsonl", "runs/teacher/weights", "notes"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / ".gitignore").write_text("runs\n")
    monkeypatch.chdir(root)
    return Luggage(Tree.of(root))


def test_a_path_of_the_tree_stays_and_one_that_is_ignored_becomes_absolute(luggage: Luggage) -> None:
    here = Path.cwd()
    words = ["data/rows.jsonl", "runs/teacher", "data.train=data/rows.jsonl", "student=runs/teacher", "data.train=runs/*"]
    found = ["data/rows.jsonl", f"{here}/runs/teacher", "data.train=data/rows.jsonl"]
    assert luggage.arguments(words) == [*found, f"student={here}/runs/teacher", f"data.train={here}/runs/*"]
    assert luggage.reached == [f"{here}/runs/teacher", f"{here}/runs/*"]


@pytest.mark.parametrize(
    "setting", ["data", "data.train", "data.held_out", "data.train.my-code", "data.held_out.prose", "endpoints.served-here.local_model"]
)
def test_a_plain_word_is_a_path_where_a_setting_names_one(luggage: Luggage, setting: str) -> None:
    assert luggage.arguments([f"{setting}=runs", f"{setting}=data", f"{setting}=elsewhere"]) == [
        *(f"{setting}={Path.cwd()}/runs", f"{setting}=data", f"{setting}=elsewhere"),
    ]
    assert luggage.reached == [f"{Path.cwd()}/runs"]


@pytest.mark.parametrize(
    "word",
    [
        *("Qwen/Qwen3-8B", "train.lr=2e-5", "--verbose", "-v", "s3://bucket/runs", "", "strategy=logits", "tags.a=", "data.split=runs"),
        *("data.subset=runs", "data.domain=runs", "data.columns.text=runs", "name=runs", "signals=runs", "train=runs"),
    ],
)
def test_other_words_stay(luggage: Luggage, word: str) -> None:
    assert luggage.arguments([word]) == [word]
    assert not luggage.reached


def test_a_recipe_goes_along_with_its_paths_and_those_of_recipes_it_names(luggage: Luggage, tmp_path: Path) -> None:
    other, recipe = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    other.write_text("student: runs/teacher\n")
    recipe.write_text(f"student: {{model: runs/teacher}}\nstrategy: notes\nbase: {other}\ndata: [data/rows.jsonl, 3]\n")
    assert luggage.arguments([str(recipe)]) == ["submitted/mine.yaml"]
    teacher = f"{Path.cwd()}/runs/teacher"
    assert yaml.safe_load(luggage.files["submitted/mine.yaml"]) == {
        "student": {"model": teacher}, "strategy": "notes", "base": "submitted/base.yaml", "data": ["data/rows.jsonl", 3],
    }  # fmt: skip
    assert yaml.safe_load(luggage.files["submitted/base.yaml"]) == {"student": teacher}


def test_a_recipe_names_paths_by_plain_words_where_its_settings_do(luggage: Luggage) -> None:
    source = {"code": "runs", "prose": "data"}
    recipe = {"name": "runs", "student": "notes", "data": {"train": source, "held_out": "elsewhere", "split": "runs"}}
    here = Path.cwd()
    assert luggage.content(recipe) == {**recipe, "data": {**recipe["data"], "train": {"code": f"{here}/runs", "prose": "data"}}}
    assert luggage.content({"data": "runs"}) == {"data": f"{here}/runs"}
    assert luggage.reached == [f"{here}/runs"]


def test_two_files_of_one_name_do_not_meet(luggage: Luggage, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.yaml").write_text(f"name: {folder}\n")
    packed = luggage.arguments([str(tmp_path / "a" / "r.yaml"), str(tmp_path / "b" / "r.yaml")])
    assert packed == ["submitted/r.yaml", "submitted/r-2.yaml"]
    assert [yaml.safe_load(luggage.files[name])["name"] for name in packed] == ["a", "b"]


def test_on_the_same_machine_every_path_is_absolute_and_none_is_to_be_reached(luggage: Luggage) -> None:
    here = Path.cwd()
    same = Luggage(luggage.tree, same_machine=True)
    assert same.arguments(["data/rows.jsonl", "student=runs/teacher"]) == [f"{here}/data/rows.jsonl", f"student={here}/runs/teacher"]
    assert not same.reached
