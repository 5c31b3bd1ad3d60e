"""What `distill submit` sends, and what it refuses to send. A submitted run is in test_submitted_run.py."""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import yaml

from cluster.jobs_client import Job, Jobs
from jobs import submit as submitting
from jobs.submit import COMMANDS, Asked, submit
from jobs.submitted import follow_job, run_of
from orchestrator.errors import Refusal

RECIPE = "student: models/student\nstrategy: cross-entropy\ndata: rows.jsonl\ntrain: {steps: 3}\n"


@dataclass
class Sent:
    """Instead of a cluster: what it was sent."""

    address: str = ""
    on_this_machine: bool = False
    id: str = ""
    command: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def submit(self, job_id: str, command: str, archive: Path, environment: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        self.id, self.command, self.environment, self.metadata = job_id, command, environment, metadata
        with zipfile.ZipFile(archive) as content:
            self.files = {name: content.read(name) for name in content.namelist()}


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The working folder is a project with a recipe; the cluster is `Sent`."""
    root = tmp_path / "project"
    (root / "models" / "student").mkdir(parents=True)
    (root / "models" / "student" / "config.json").write_text("{}")
    (root / "recipe.yaml").write_text(RECIPE)
    settings = f"storage: {root}/runs\nsecrets: [HF_TOKEN]\nenvironment: {{HF_HOME: /data}}\njobs: {{package_mib: 1}}\n"
    (root / "ray_config.yaml").write_text(settings)
    monkeypatch.chdir(root)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk_very_secret")
    found = Sent()

    def connect(address: str) -> Sent:
        found.address = address
        return found

    monkeypatch.setattr(submitting, "Jobs", connect)
    return found


def ask(*words: str, command: str = "run", retries: int | None = None, address: str | None = "http://head:8265") -> int:
    return submit(Asked(command, words, None, address, retries, follow=False))


def test_a_run_takes_its_recipe_and_settings_along_and_is_named_here(sent: Sent, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("recipe.yaml", "train.lr=1e-3", "--verbose") == 0
    words = shlex.split(sent.command)
    name = words[-3].removeprefix("name=")
    assert words == [
        *("exec", "python", "-m", "jobs.cli", "run", "submitted/recipe.yaml", "train.lr=1e-3", "--verbose"),
        *(f"name={name}", "--cluster", "submitted/ray_config.yaml"),
    ]
    assert yaml.safe_load(sent.files["submitted/recipe.yaml"]) == yaml.safe_load(RECIPE)
    settings = yaml.safe_load(sent.files["submitted/ray_config.yaml"])
    assert (settings["address"], settings["storage"]) == ("auto", str(Path.cwd() / "runs"))
    assert sent.metadata["run_folder"] == f"{Path.cwd()}/runs/{name}"
    assert sent.metadata["command"] == "distill run recipe.yaml train.lr=1e-3 --verbose"
    assert sent.environment["HF_HOME"] == "/data"
    told = capsys.readouterr().err
    assert all(f"distill jobs {word} {sent.id}" in told for word in ("logs --follow", "status", "stop"))


def test_no_secret_leaves_this_machine(sent: Sent, capsys: pytest.CaptureFixture[str]) -> None:
    ask("recipe.yaml")
    everything = [sent.command, repr(sent.environment), repr(sent.metadata), repr(sent.files), capsys.readouterr().err]
    assert not [text for text in everything if "very_secret" in text]


def test_a_second_try_goes_on_from_the_runs_folder(sent: Sent) -> None:
    ask("recipe.yaml", "name=mine", retries=2)
    words = shlex.split(sent.command)
    folder = f"{Path.cwd()}/runs/mine"
    assert words[:7] == ["exec", "python", "-m", "cluster.retrying", "2", f"{folder}/recipe.yaml", "--"]
    again = words[words.index("--then") + 1 :]
    assert again == ["python", "-m", "jobs.cli", "run", "--resume", folder, "--cluster", "submitted/ray_config.yaml"]


@pytest.mark.parametrize(("storage", "inner"), [("/data/runs", ""), ("s3://bucket/runs", "driver/")])
def test_a_search_is_gone_on_with_once_it_is_written_down(sent: Sent, storage: str, inner: str) -> None:
    Path("ray_config.yaml").write_text(f"storage: {storage}\n")
    Path("recipe.yaml").write_text(f"{RECIPE}search: {{space: {{train.lr: {{choice: [0.1, 0.2]}}}}}}\n")
    ask("recipe.yaml", "name=mine", command="search", retries=1)
    words = shlex.split(sent.command)
    assert words[:7] == ["exec", "python", "-m", "cluster.retrying", "1", f"{storage}/mine/{inner}search.yaml", "--"]
    again = words[words.index("--then") + 1 :]
    assert again[:6] == ["python", "-m", "jobs.cli", "search", "--resume", f"{storage}/mine"]


@pytest.mark.parametrize("words", [("--resume", "runs/earlier"), ("--resume=runs/earlier",)])
def test_a_resumed_run_keeps_its_folder(sent: Sent, words: tuple[str, ...]) -> None:
    (Path.cwd() / "runs" / "earlier").mkdir(parents=True)
    ask(*words)
    assert f"--resume {Path.cwd()}/runs/earlier " in sent.command
    assert sent.metadata["run_folder"] == f"{Path.cwd()}/runs/earlier"


def test_what_would_be_refused_there_is_refused_here(sent: Sent) -> None:
    with pytest.raises(Refusal, match=r"train\.learning_rate"):
        ask("recipe.yaml", "train.learning_rate=1")
    with pytest.raises(Refusal, match="no recipe"):
        ask()
    with pytest.raises(Refusal, match=f"one of {', '.join(COMMANDS)}"):
        ask("recipe.yaml", command="quickstart")
    assert not sent.command


def test_a_tree_that_is_too_large_is_refused_with_what_makes_it_so(sent: Sent) -> None:
    (Path.cwd() / "models" / "student" / "model.safetensors").write_bytes(b"0" * (3 << 20))
    (Path.cwd() / "rows.jsonl").write_bytes(b"0" * (1 << 20))
    with pytest.raises(Refusal) as refused:
        ask("recipe.yaml")
    assert "models/student/model.safetensors 3.0 MiB; rows.jsonl 1.0 MiB" in refused.value.do
    assert ".rayignore" in refused.value.do
    (Path.cwd() / ".rayignore").write_text("models\n*.jsonl\n")
    assert ask("recipe.yaml") == 0
    recipe = yaml.safe_load(sent.files["submitted/recipe.yaml"])
    assert recipe["student"] == str(Path.cwd() / "models" / "student")  # left out, so it must be reached


def test_a_relative_storage_folder_is_for_this_machine_alone(sent: Sent) -> None:
    Path("ray_config.yaml").write_text("storage: runs\n")
    with pytest.raises(Refusal, match="absolute folder that every node reaches"):
        ask("recipe.yaml")
    sent.on_this_machine = True
    ask("recipe.yaml")
    assert yaml.safe_load(sent.files["submitted/ray_config.yaml"])["storage"] == str(Path.cwd() / "runs")


def test_a_password_in_an_address_is_refused_because_it_would_be_stored(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:very_secret@mlflow.example")
    with pytest.raises(Refusal, match="MLFLOW_TRACKING_PASSWORD") as refused:
        ask("recipe.yaml")
    assert "very_secret" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    ask("recipe.yaml")
    assert yaml.safe_load(sent.files["submitted/ray_config.yaml"])["mlflow"]["tracking_uri"] == "https://mlflow.example"
    assert sent.metadata["mlflow_tracking_uri"] == "https://mlflow.example"


def test_evaluate_takes_its_models_and_its_recipe(sent: Sent) -> None:
    ask("models/student", "Qwen/Qwen3-0.6B", "--recipe", "recipe.yaml", "--set", "train.steps=2", command="evaluate", retries=0)
    words = "models/student Qwen/Qwen3-0.6B --recipe submitted/recipe.yaml --set train.steps=2"
    assert sent.command == f"exec python -m jobs.cli evaluate {words}"
    assert "run_folder" not in sent.metadata


def test_the_address_is_the_named_one_else_that_of_the_settings(sent: Sent) -> None:
    ask("recipe.yaml")
    assert sent.address == "http://head:8265"
    ask("recipe.yaml", address=None)
    assert sent.address == "local"


def test_ctrl_c_ends_the_watching_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    class Watched:
        def follow(self, job_id: str, write: object) -> Job:
            raise KeyboardInterrupt

    assert follow_job(cast(Jobs, Watched()), "mine", "http://head:8265") == 130
    told = capsys.readouterr().err
    assert "mine; it goes on" in told
    assert "distill jobs stop mine --address http://head:8265" in told


def test_status_knows_a_run_by_its_folder(tmp_path: Path) -> None:
    job = Job(
        "a", "RUNNING", "", "", {"run_folder": str(tmp_path), "mlflow_tracking_uri": f"sqlite:///{tmp_path}/none.db"}, 1.0, None, None
    )
    assert run_of(job) == {"Run": str(tmp_path), "MLflow": "knows no run of it yet"}
    (tmp_path / "mlflow.json").write_text('{"uri": "https://mlflow.example", "experiment_id": "1", "run_id": "abc"}')
    assert run_of(job)["MLflow"] == "https://mlflow.example/#/experiments/1/runs/abc (run abc, RUNNING)"
