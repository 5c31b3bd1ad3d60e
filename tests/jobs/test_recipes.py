"""Every shipped recipe is a valid one."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import load_job, to_yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_loads_builds_and_survives_a_round_trip(recipe: Path, tmp_path: Path) -> None:
    job = load_job(recipe, cluster=ROOT / "ray_config.yaml")
    strategy = job.run.build()
    assert {s.endpoint for s in strategy.stages if s.endpoint} <= set(job.endpoints)
    again = tmp_path / "recipe.yaml"
    again.write_text(to_yaml(job.run))
    assert load_job(again).run == job.run
