"""Files that start a cluster elsewhere: valid where a schema is published, and saying what `ray_config.yaml` says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import ClusterConfig
from cluster.deploy.docker import FOLDERS, dockerfile
from cluster.deploy.kuberay import ray_cluster, ray_job
from cluster.deploy.launcher import launcher
from cluster.yaml_text import read_yaml, write_yaml
from jobs.render import rendered
from orchestrator.errors import Refusal

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.37"
LAUNCHER_SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())

START = {"type": "object", "additionalProperties": {"type": "string"}}
CLUSTER_SPEC = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {"type": "object", "properties": {"mode": {"enum": ["disabled", "token"]}}, "additionalProperties": False},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "headGroupSpec": {
            "type": "object",
            "required": ["rayStartParams", "template"],
            "additionalProperties": False,
            "properties": {"rayStartParams": START, "template": {"type": "object"}},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                "additionalProperties": False,
                "properties": {
                    "groupName": {"type": "string"},
                    **{k: {"type": "integer", "minimum": 0} for k in ("replicas", "minReplicas", "maxReplicas")},
                    "rayStartParams": START,
                    "template": {"type": "object"},
                },
            },
        },
    },
}
JOB_SPEC = {
    "type": "object",
    "required": ["entrypoint", "rayClusterSpec"],
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": {"type": "integer"},
        "backoffLimit": {"type": "integer"},
        "rayClusterSpec": CLUSTER_SPEC,
    },
}
"""Of KubeRay's resources (ray.io/v1), what is rendered here, by its API reference: names, types and what must be there. The pods in
them have Kubernetes' own schema."""

CONFIG: dict[str, Any] = {
    "storage": "/data/runs",
    "environment": {"HF_HOME": "/data/hub", "NOTE": 'a "word" for $5'},
    "secrets": ["HF_TOKEN"],
    "jobs": {"retries": 2},
    "nodes": {
        "image": "registry/distill:1",
        "claim": "runs",
        "head": {"cpus": 2, "memory_gib": 8, "machine": {"InstanceType": "m5.large"}},
        "groups": {"students": {"gpus": 8, "cpus": 64, "memory_gib": 512, "min": 1, "max": 4}, "teachers": {"min": 2, "max": 2}},
    },
}


def config(**changes: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({**CONFIG, **changes})


@pytest.mark.parametrize("content", [{}, CONFIG])
def test_manifests_have_the_shape_that_kuberay_documents(content: dict[str, Any]) -> None:
    given = ClusterConfig.model_validate(content)
    cluster, job = ray_cluster(given), ray_job(given, ["python", "-m", "jobs.cli", "run", "a b.yaml"], "distill-run")
    assert (cluster["apiVersion"], cluster["kind"], job["kind"]) == ("ray.io/v1", "RayCluster", "RayJob")
    jsonschema.validate(cluster["spec"], CLUSTER_SPEC)
    jsonschema.validate(job["spec"], JOB_SPEC)
    for node in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, **node["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert yaml.safe_load(write_yaml(cluster)) == cluster
    assert job["spec"]["entrypoint"] == "python -m jobs.cli run 'a b.yaml'"


def test_manifests_say_what_the_settings_say() -> None:
    spec = ray_cluster(config())["spec"]
    students, teachers = spec["workerGroupSpecs"]
    assert [students[k] for k in ("groupName", "replicas", "minReplicas", "maxReplicas")] == ["students", 1, 1, 4]
    assert (teachers["minReplicas"], spec["enableInTreeAutoscaling"], spec["authOptions"]) == (2, True, {"mode": "token"})
    (container,) = students["template"]["spec"]["containers"]
    assert container["image"] == "registry/distill:1"
    assert container["resources"]["limits"] == {"cpu": 64, "memory": "512Gi", "nvidia.com/gpu": 8}
    assert {"name": "HF_HOME", "value": "/data/hub"} in container["env"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "distill-secrets", "key": "HF_TOKEN"}}} in container["env"]
    assert {"name": "storage", "mountPath": "/data/runs"} in container["volumeMounts"]
    assert {v["name"] for v in students["template"]["spec"]["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert ray_job(config(), ["x"], "n")["spec"]["backoffLimit"] == 0


@pytest.mark.parametrize(
    "provider", [{"type": "aws", "region": "us-west-2"}, {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}]
)
def test_the_launcher_file_fits_the_schema_that_ray_ships(provider: dict[str, Any]) -> None:
    content = launcher(config(nodes={**CONFIG["nodes"], "provider": provider}))
    jsonschema.validate(content, LAUNCHER_SCHEMA)
    if provider["type"] == "aws":
        validate_config(prepare_config(content))  # Ray's own door, with defaults filled in
        types = content["available_node_types"]
        assert types["students"]["resources"] == {"CPU": 64, "GPU": 8}
        assert (types["students"]["min_workers"], types["students"]["max_workers"], content["max_workers"]) == (1, 4, 6)
        assert types["head"]["node_config"] == {"InstanceType": "m5.large"}
    options = content["docker"]["run_options"]
    assert "--env HF_TOKEN" in options
    assert all("RAY_AUTH_MODE=token" in c for k in ("head", "worker") for c in content[f"{k}_start_ray_commands"] if "ray start" in c)


def test_the_image_has_the_whole_program_in_the_environment_that_is_pinned() -> None:
    text = dockerfile(config().environment)
    (listed,) = re.findall(r"^include = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed == ", ".join(f'"{folder}*"' for folder in FOLDERS)
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source
    assert r'ENV NOTE="a \"word\" for \$5"' in text
    assert text.rstrip().endswith("USER ray")
    pinned = re.search(r'requires-python = ">=(\d\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned
    assert f"FROM python:{pinned[1]}-slim" in text


@pytest.mark.parametrize("what", ["raycluster", "rayjob", "launcher", "docker"])
def test_no_secret_of_the_environment_gets_into_a_file(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    words = ["run", "jobs/recipes/tiny_logits.yaml"] if what == "rayjob" else []
    text = rendered(what, words, config())
    assert "hf_very_secret" not in text
    assert ("HF_TOKEN" in text) == (what != "docker")


def test_a_rayjob_needs_a_command_and_nothing_else_takes_one() -> None:
    with pytest.raises(Refusal, match="no command"):
        rendered("rayjob", [], config())
    with pytest.raises(Refusal, match="'run'"):
        rendered("raycluster", ["run"], config())


def entrypoint(*words: str, **changes: Any) -> list[str]:
    return shlex.split(yaml.safe_load(rendered("rayjob", words, config(**changes)))["spec"]["entrypoint"])


def test_a_rayjobs_second_try_goes_on_with_the_run_of_the_first() -> None:
    recipe, program = "jobs/recipes/tiny_logits.yaml", ["python", "-m", "jobs.cli", "run"]
    words = entrypoint("run", recipe, "train.steps=3")
    name = words[words.index("--then") - 1].removeprefix("name=")
    assert words == [
        *("python", "-m", "cluster.retrying", "2", f"/data/runs/{name}/recipe.yaml", "--", *program, recipe, "train.steps=3"),
        *(f"name={name}", "--then", *program, "--resume", f"/data/runs/{name}"),
    ]
    assert "s3://bucket/runs/mine/recipe.yaml" in entrypoint("run", recipe, "name=mine", storage="s3://bucket/runs")
    searched = ("search", "jobs/recipes/tiny_search.yaml", "name=mine")
    assert "/data/runs/mine/search.yaml" in entrypoint(*searched)
    assert "s3://bucket/runs/mine/driver/search.yaml" in entrypoint(*searched, storage="s3://bucket/runs")
    assert entrypoint("run", recipe, jobs={}) == [*program, recipe]
    assert entrypoint("doctor")[3:] == ["2", "/dev/null", "--", *program[:3], "doctor", "--then", *program[:3], "doctor"]


@pytest.mark.parametrize("path", ["my.yaml", "../jobs/x.yaml", "/home/me/my.yaml"])
def test_a_recipe_that_the_image_lacks_is_refused(path: str) -> None:
    with pytest.raises(Refusal, match="not in the image"):
        rendered("rayjob", ["run", path], config())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a recipe, settings of its own, and others that go into the image and that do not."""
    (tmp_path / "jobs" / "recipes").mkdir(parents=True)
    (tmp_path / "jobs" / "recipes" / "r.yaml").write_text(
        "student: some/model\nstrategy: cross-entropy\ndata: rows.jsonl\ntrain: {steps: 3}\n"
    )
    for name in ("ray_config.yaml", "other.yaml", "jobs/other.yaml", "jobs/ray_config.yaml"):
        (tmp_path / name).write_text("storage: /data/runs\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_with(settings: Path, *words: str, retries: int = 0) -> list[str]:
    text = rendered("rayjob", words, config(jobs={"retries": retries}), settings)
    return shlex.split(yaml.safe_load(text)["spec"]["entrypoint"])


@pytest.mark.parametrize("name", ["jobs/other.yaml", "jobs/ray_config.yaml"])
def test_a_rayjob_names_settings_that_are_not_those_of_the_project(project: Path, name: str) -> None:
    words = ("run", "jobs/recipes/r.yaml", "name=mine")
    for settings in (Path(name), project / name):
        assert command_with(settings, *words) == ["python", "-m", "jobs.cli", *words, "--cluster", name]
        again = command_with(settings, *words, retries=1)
        cut = again.index("--then")
        assert again[cut - 2 : cut] == again[-2:] == ["--cluster", name]
        assert again[cut - 3] == "name=mine"
    for settings in (Path("ray_config.yaml"), Path("./ray_config.yaml"), project / "ray_config.yaml"):
        assert "--cluster" not in command_with(settings, *words, retries=1)


def test_a_rayjobs_settings_that_the_image_lacks_are_refused(project: Path) -> None:
    for settings in (Path("other.yaml"), project / "other.yaml", Path("../elsewhere.yaml")):
        with pytest.raises(Refusal, match="not in the image") as refused:
            command_with(settings, "run", "jobs/recipes/r.yaml")
        assert "build the image anew" in refused.value.do
    assert command_with(Path("other.yaml"), "evaluate", "some/model")[-2:] == ["evaluate", "some/model"]  # which reads none


def test_runs_that_would_go_with_their_pods_are_refused() -> None:
    nodes = {**CONFIG["nodes"], "claim": None}
    with pytest.raises(Refusal, match=r"nodes\.claim"):
        rendered("raycluster", [], config(nodes=nodes))
    assert "persistentVolumeClaim" not in rendered("raycluster", [], config(nodes=nodes, storage="s3://bucket/runs"))
    assert "cluster_name" in rendered("launcher", [], config(nodes=nodes))


def test_the_shipped_settings_render() -> None:
    shipped = ClusterConfig.model_validate(read_yaml(ROOT / "ray_config.yaml"))
    jsonschema.validate(ray_cluster(shipped)["spec"], CLUSTER_SPEC)
