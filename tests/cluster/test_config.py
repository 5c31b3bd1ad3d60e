"""`ray_config.yaml`: shown with every default, and refused where it would leak or cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.yaml_text import read_yaml, write_yaml
from orchestrator.config import load_cluster
from orchestrator.errors import Refusal
from orchestrator.run import check_address

SHIPPED = Path(__file__).parents[2] / "ray_config.yaml"


def keys(content: Any) -> Any:
    return {key: keys(value) for key, value in content.items()} if isinstance(content, dict) else None


def test_the_shipped_file_shows_every_setting_with_its_default() -> None:
    content = read_yaml(SHIPPED)
    assert load_cluster(SHIPPED) == ClusterConfig()
    assert keys(content) == keys(ClusterConfig().model_dump(mode="json"))


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "my_credentials"])
def test_a_value_that_sounds_like_a_secret_is_refused_and_not_repeated(tmp_path: Path, name: str) -> None:
    file = tmp_path / "ray_config.yaml"
    file.write_text(write_yaml({"environment": {name: "hf_very_secret"}}))
    with pytest.raises(Refusal, match=f"{name}") as refused:
        load_cluster(file)
    assert "hf_very_secret" not in str(refused.value)
    file.write_text(write_yaml({"secrets": [name], "environment": {"HF_HOME": "/data"}}))
    assert load_cluster(file).secrets == (name,)


def test_a_run_that_starts_here_takes_no_jobs_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Refusal, match="distill submit run"):
        check_address(ClusterConfig(address="http://head:8265"))
    for address in ("local", "auto", "head:6379", "ray://head:10001"):
        check_address(ClusterConfig(address=address))


def test_inside_a_job_the_address_is_the_jobs_own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ClusterConfig().ray_address == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert ClusterConfig(address="http://head:8265").ray_address == "auto"
    check_address(ClusterConfig(address="http://head:8265"))


def test_a_group_has_no_more_nodes_at_least_than_at_most() -> None:
    with pytest.raises(ValueError, match=r"at most `max` \(2\) nodes as `min`, got 3"):
        ClusterConfig.model_validate({"nodes": {"groups": {"workers": {"min": 3, "max": 2}}}})


@pytest.mark.parametrize("empty", ["", " "])
def test_a_model_without_a_name_is_not_the_current_folder(empty: str) -> None:
    with pytest.raises(Refusal, match=r"endpoints\.teacher\.model: got '\s?'; expected a folder of a saved model"):
        load_cluster({"endpoints": {"teacher": {"model": empty}}})
