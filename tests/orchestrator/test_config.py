"""Recipes and overrides: what is read, what is merged, and how each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig, FakeEndpoint, TransformersEndpoint
from orchestrator.config import RunConfig, load_job, to_yaml
from orchestrator.errors import Refusal
from orchestrator.explain import nearest
from strategies.core import Progress
from strategies.likelihood import CrossEntropyOnly
from strategies.logits import Logits
from strategies.schedule import Ramp

ROOT = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {"student": "some/model", "strategy": "logits", "data": "rows.jsonl"}


def recipe(**more: Any) -> dict[str, Any]:
    return {**RECIPE, **more}


def refused(content: dict[str, Any], *overrides: str, cluster: dict[str, Any] | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        load_job(content, overrides, cluster)
    return caught.value


def test_short_forms_stand_for_the_main_key_of_a_section() -> None:
    run = load_job(recipe(train={"layout": "fsdp2"})).run
    assert (run.student.model, run.data.train, run.train.layout.type) == ("some/model", "rows.jsonl", "fsdp2")
    assert isinstance(run.strategy, Logits) and run.strategy == Logits()


def test_a_strategy_with_settings_is_the_type_it_names() -> None:
    run = load_job(recipe(strategy={"type": "logits", "top_k": 8, "kd_weight": {"ramp": [0.1, 0.9]}})).run
    assert isinstance(run.strategy, Logits)
    assert (run.strategy.top_k, run.strategy.kd_weight) == (8, Ramp(ramp=(0.1, 0.9)))
    assert isinstance(load_job(recipe(strategy="cross-entropy")).run.strategy, CrossEntropyOnly)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.lr=2e-5", "train.lr", 2e-5),
        ("train.steps=10", "train.steps", 10),
        ("train.layout=deepspeed", "train.layout.type", "deepspeed"),
        ("train.layout.zero_stage=3", "train.layout.zero_stage", 3),
        ("student.dtype=bfloat16", "student.dtype", "bfloat16"),
        ("student.lora.r=4", "student.lora.r", 4),
        ("strategy.top_k=5", "strategy.top_k", 5),
        ("data.columns={question: prompt}", "data.columns", {"question": "prompt"}),
        ("train.betas=[0.8, 0.95]", "train.betas", (0.8, 0.95)),
        ('tags.version="1"', "tags", {"version": "1"}),
        ("name=a=b", "name", "a=b"),
        ("student.revision=123e4", "student.revision", "123e4"),
        ("strategy.kd_weight=2e-1", "strategy.kd_weight", 0.2),
        ("data.held_out=null", "data.held_out", None),
    ],
)
def test_an_override_reaches_the_setting_it_names(override: str, path: str, value: object) -> None:
    here: Any = load_job(RECIPE, [override]).run
    for name in path.split("."):
        here = getattr(here, name)
    assert here == value


def test_an_override_of_a_short_form_keeps_what_the_short_form_said() -> None:
    run = load_job(RECIPE, ["student.dtype=bfloat16", "strategy.top_k=5"]).run
    assert run.student.model == "some/model" and isinstance(run.strategy, Logits)


def test_the_last_override_wins() -> None:
    assert load_job(RECIPE, ["seed=1", "seed=2"]).run.seed == 2


def test_overrides_leave_the_given_recipe_alone() -> None:
    given = recipe(train={"lr": 1e-3})
    load_job(given, ["train.lr=5.0", "data.columns.a=b"], {"endpoints": {"t": {"model": "x"}}})
    assert given == recipe(train={"lr": 1e-3})


@pytest.mark.parametrize("override", ["train.lr", "=3", "train..lr=3", ".lr=3"])
def test_a_malformed_override_shows_a_good_one(override: str) -> None:
    refusal = refused(RECIPE, override)
    assert override in refusal.where and "train.lr=2e-5" in refusal.expected


@pytest.mark.parametrize(
    ("content", "where", "meant"),
    [
        (recipe(trian={}), "recipe: trian", "train"),
        (recipe(train={"stesp": 3}), "recipe: train.stesp", "steps"),
        (recipe(train={"layout": {"type": "ddp", "zero_stag": 1}}), "recipe: train.layout.zero_stag", "zero_stage"),
        (recipe(endpoints={"t": {"modle": "m", "model": "m"}}), "recipe: endpoints.t.modle", "model"),
        (recipe(strategy={"type": "logits", "topk": 3}), "recipe: strategy: topk", "top_k"),
        (recipe(strategy="logit"), "recipe: strategy.type", "logits"),
        (recipe(endpoints={"t": {"engine": "transformer", "model": "m"}}), "recipe: endpoints.t.engine", "transformers"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(content: dict[str, Any], where: str, meant: str) -> None:
    refusal = refused(content)
    assert refusal.where == where
    assert f"Did you mean {meant!r}?" in refusal.do and meant in refusal.expected


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({k: v for k, v in RECIPE.items() if k != "student"}, "recipe: student"),
        (recipe(endpoints={"t": {"engine": "fake"}}), "recipe: endpoints.t.vocabulary"),
        (recipe(endpoints={"t": {}}), "recipe: endpoints.t.model"),
    ],
)
def test_a_missing_setting_is_named_by_the_path_one_would_write(content: dict[str, Any], where: str) -> None:
    refusal = refused(content)
    assert (refusal.where, refusal.got) == (where, "nothing")
    assert where.removeprefix("recipe: ") in refusal.do


@pytest.mark.parametrize(
    ("content", "where", "got"),
    [
        (recipe(train={"layout": "dpp"}), "recipe: train.layout", "'dpp'"),
        (recipe(train={"lr": -1}), "recipe: train.lr", "-1"),
        (recipe(train={"lr": float("inf")}), "recipe: train.lr", "inf"),
        (recipe(train={"steps": 1.5}), "recipe: train.steps", "1.5"),
        (recipe(train={"betas": [0.9, "x"]}), "recipe: train.betas.1", "'x'"),
        (recipe(strategy={"type": "logits", "kd_weight": "abc"}), "recipe: strategy: kd_weight", "'abc'"),
        (recipe(strategy={"type": "logits", "kd_weight": float("nan")}), "recipe: strategy: kd_weight", "nan"),
        (recipe(strategy={"type": "logits", "temperature": 0}), "recipe: strategy: temperature", "0"),
        (recipe(strategy=None), "recipe: strategy", "None"),
        (recipe(strategy=["logits"]), "recipe: strategy", "['logits']"),
        (recipe(student=None), "recipe: student", "None"),
        (recipe(endpoints=["t"]), "recipe: endpoints", "['t']"),
        (recipe(endpoints={"t": "m"}), "recipe: endpoints.t", "'m'"),
        (recipe(data=Path("rows.jsonl")), "recipe: data", repr(Path("rows.jsonl"))),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_itself(content: dict[str, Any], where: str, got: str) -> None:
    refusal = refused(content, cluster={"endpoints": {"t": {"model": "m"}}})
    assert (refusal.where, refusal.got) == (where, got)
    assert refusal.expected and refusal.do


def test_mistakes_in_the_cluster_file_are_told_as_such() -> None:
    assert refused(RECIPE, cluster={"resources": {"worker": {"cpu": 1}}}).where == "ray_config.yaml: resources.worker.cpu"
    assert refused(RECIPE, cluster={"endpoints": ["t"]}).where == "ray_config.yaml: endpoints"


def test_files_are_read_and_named_in_refusals(tmp_path: Path) -> None:
    good, wrong, broken = tmp_path / "good.yaml", tmp_path / "list.yaml", tmp_path / "broken.yaml"
    good.write_text("student: m\nstrategy: logits\ndata: d\ntrian: {}\n")
    wrong.write_text("- student\n")
    broken.write_text("student: [m\n")
    for path, got in ((good, "trian"), (wrong, "list"), (broken, "not YAML"), (tmp_path / "absent.yaml", "No such file")):
        with pytest.raises(Refusal) as caught:
            load_job(path)
        assert str(path) in caught.value.where and got in caught.value.got


def test_an_empty_recipe_file_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(Refusal):
        load_job(empty)


def test_a_recipe_changes_single_fields_of_a_cluster_endpoint() -> None:
    cluster = {"endpoints": {"big": {"model": "big/model", "dtype": "bfloat16", "actors": 2}, "other": {"model": "o"}}}
    own = {"big": {"actors": 3}, "mine": {"engine": "fake", "vocabulary": 9}}
    job = load_job(recipe(endpoints=own), ["endpoints.big.dtype=float32"], cluster)
    big, mine = job.endpoints["big"], job.endpoints["mine"]
    assert isinstance(big, TransformersEndpoint) and isinstance(mine, FakeEndpoint)
    assert (big.model, big.dtype, big.actors, mine.vocabulary) == ("big/model", "float32", 3, 9)
    assert set(job.endpoints) == {"base", "big", "other", "mine", "student", "replay"}
    assert job.cluster.endpoints["big"].actors == 2


def test_a_written_recipe_reads_back_as_the_same_run(tmp_path: Path) -> None:
    strategy = {"type": "logits", "temperature": {"cosine": [2.0, 1.0]}, "ce_weight": {"steps": [[0, 1.0], [5, 0.0]]}}
    content = recipe(strategy=strategy, train={"steps": 7, "layout": "fsdp2"}, endpoints={"t": {"model": "m"}})
    run = load_job(content, ["student.lora.r=4", "tags.why=test", "train.lr=1e-7"]).run
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(run))
    assert load_job(path).run == run


@pytest.mark.parametrize(
    ("written", "environment", "used"),
    [
        ("local", None, "local"),
        ("local", "head:6379", "head:6379"),
        ("auto", "head:6379", "auto"),
        ("other:6379", "head:6379", "other:6379"),
    ],
)
def test_ray_address_replaces_only_local(written: str, environment: str | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert ClusterConfig(address=written).ray_address == used


def test_the_tracking_address_is_given_or_in_the_environment_or_a_file_beside_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plain = ClusterConfig(storage="some/runs")
    assert plain.tracking_uri.startswith("sqlite:////") and plain.tracking_uri.endswith("/some/runs/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert plain.tracking_uri == "http://server:5000"
    assert ClusterConfig.model_validate({"mlflow": {"tracking_uri": "http://mine"}}).tracking_uri == "http://mine"


def test_the_shipped_cluster_file_is_the_defaults_written_out() -> None:
    shipped = ROOT / "ray_config.yaml"
    content = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    assert load_job(RECIPE, cluster=shipped).cluster == ClusterConfig()
    missing = set(ClusterConfig.model_fields) - set(content)
    assert not missing, f"ray_config.yaml does not show {sorted(missing)}"


def test_every_recipe_in_the_package_loads() -> None:
    for path in sorted((ROOT / "jobs" / "recipes").glob("*.yaml")):
        assert isinstance(load_job(path, cluster=ROOT / "ray_config.yaml").run, RunConfig), path.name


def test_the_learning_rate_of_a_run_follows_its_own_settings() -> None:
    train = load_job(recipe(train={"lr_schedule": "linear", "warmup_steps": 2, "lr_final_share": 0.5})).run.train
    rates = [train.learning_rate(Progress(step=s, steps=6)) for s in (0, 1, 2, 4, 6)]
    assert rates == pytest.approx([2e-5 * share for share in (0.5, 1.0, 1.0, 0.75, 0.5)])


def test_the_peak_of_the_learning_rate_may_change_in_mid_run() -> None:
    train = load_job(recipe(train={"lr": {"steps": [[0, 1e-2], [3, 1e-3]]}, "lr_schedule": "linear"})).run.train
    assert [train.learning_rate(Progress(step=s, steps=4)) for s in (0, 2, 3)] == pytest.approx([1e-2, 0.5e-2, 0.25e-3])


def test_nothing_is_suggested_for_a_word_that_is_near_to_none() -> None:
    assert nearest("zebra", ["train", "data"]) == ""


def test_a_plain_name_changes_the_student_and_keeps_what_stands_beside_it() -> None:
    content = recipe(student={"model": "a", "init": "random"}) | {"train": {"steps": 1, "layout": {"type": "deepspeed", "zero_stage": 3}}}
    run = load_job(content, ["student=b", "train.layout=fsdp2", "student.lora.r=3"]).run
    assert (run.student.model, run.student.init, run.student.lora and run.student.lora.r) == ("b", "random", 3)
    assert run.train.layout.type == "fsdp2"


def test_models_are_found_from_any_directory_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a cluster do not work in the directory of the command."""
    (tmp_path / "models" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = {
        "student": {"model": "models/small", "tokenizer": "./models/small"},
        "strategy": "logits",
        "data": "none",
        "train": {"steps": 1},
    }
    job = load_job({**recipe, "endpoints": {"teacher": {"model": "models/small"}, "hub": {"model": "Qwen/Qwen3-8B"}}})
    here = str(tmp_path / "models" / "small")
    assert (job.run.student.model, job.run.student.tokenizer) == (here, here)
    assert [getattr(job.endpoints[name], "model", None) for name in ("teacher", "hub")] == [here, "Qwen/Qwen3-8B"]


def test_the_students_own_endpoints_have_its_model() -> None:
    student = {"model": "s", "revision": "r", "dtype": "bfloat16"}
    job = load_job(recipe(student=student, endpoints={"base": {"actors": 2}}))
    base, writer = job.endpoints["base"], job.endpoints["student"]
    assert isinstance(base, TransformersEndpoint) and isinstance(writer, TransformersEndpoint)
    assert (base.model, base.revision, base.dtype, base.actors, base.follows_student) == ("s", "r", "bfloat16", 2, False)
    assert (writer.model, writer.revision, writer.follows_student) == ("s", "r", True)
    other = load_job(recipe(student=student, endpoints={"base": {"model": "b"}})).endpoints["base"]
    assert isinstance(other, TransformersEndpoint) and (other.model, other.revision, other.dtype) == ("b", None, "auto")
    assert "base" not in load_job(recipe(student={**student, "init": "random"})).endpoints
