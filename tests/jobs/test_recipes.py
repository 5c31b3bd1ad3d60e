"""Every shipped recipe is a valid one."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest

from orchestrator.config import load_job, to_yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


MAKERS = {"quickstart": "quickstart`", "arithmetic": "distill task arithmetic`", "specialists": "distill task specialists`"}
"""Folders of `runs/` that shipped recipes read, and the end of the command that makes each."""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_opens_with_the_command_that_makes_what_it_reads(recipe: Path) -> None:
    text = recipe.read_text("utf-8")
    head = "".join(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    read = set(re.findall(r"\bruns/(\w+)", text.removeprefix(head)))
    assert [folder for folder in read if MAKERS[folder] not in head] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_no_shipped_recipe_asks_for_a_package_that_no_requirement_brings(recipe: Path) -> None:
    job = load_job(recipe)
    asked = [job.run.student, *job.run.endpoints.values()]
    assert {getattr(who, "attention", "sdpa") for who in asked} == {"sdpa"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_loads_builds_and_survives_a_round_trip(recipe: Path, tmp_path: Path) -> None:
    job = load_job(recipe, cluster=ROOT / "ray_config.yaml")
    strategy = job.run.build()
    assert {s.endpoint for s in strategy.stages if s.endpoint} <= set(job.endpoints)
    again = tmp_path / "recipe.yaml"
    again.write_text(to_yaml(job.run))
    assert load_job(again).run == job.run
