"""Runs whose folder is in remote storage: nothing of them is on the driver's machine alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.storage import Folder
from orchestrator import mirror
from orchestrator.errors import Refusal
from orchestrator.journal import Journal, MetricRow, RunRecord
from orchestrator.mirror import mirrored
from orchestrator.order import Order
from orchestrator.owner import COPY
from orchestrator.reading import OrderSource, bundles_of, place_of_rows
from orchestrator.saved_run import saved_job
from orchestrator.search import drive
from orchestrator.tracking_uri import of_record
from tests.s3 import s3_bucket
from tests.tiny import source_text, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 14, 5


@pytest.fixture
def far() -> Folder:
    """A run's folder in a storage of this process."""
    return Folder(f"memory://runs/{uuid.uuid4().hex}")


def row(step: int) -> MetricRow:
    return MetricRow(step, 1, {"loss": 1.0}, 0.0)


def steps(folder: Path) -> list[int]:
    return [r.step for r in Journal(folder).rows()]


def test_what_a_driver_wrote_is_there_for_the_next_one_elsewhere(far: Folder, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with mirrored(here, far):
        Journal(here).append([row(1)])
        RunRecord("https://me:secret@server/", "1", "run").save(here)
    with mirrored(there, far):
        assert steps(there) == [1]
        assert RunRecord.load(there) == RunRecord("https://server/", "1", "run")
        Journal(there).append([row(2)])
    with mirrored(here, far):
        assert steps(here) == [1, 2]


def test_files_here_are_kept_when_the_copy_is_of_them(far: Folder, tmp_path: Path) -> None:
    """They are ahead of it, for a driver that was killed had no time to copy."""
    with mirrored(tmp_path, far):
        Journal(tmp_path).append([row(1)])
    Journal(tmp_path).append([row(2)])
    with mirrored(tmp_path, far):
        assert steps(tmp_path) == [1, 2]


def test_a_copy_follows_while_the_run_goes_on(far: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(mirror, "LEAST_PAUSE", 0)
    with mirrored(tmp_path, far):
        Journal(tmp_path).append([row(1)])
        end = time.monotonic() + 10
        while not far.child(COPY).exists("metrics.jsonl"):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_database_of_one_machine_is_no_address_for_another(far: Folder, tmp_path: Path) -> None:
    with mirrored(tmp_path / "here", far):
        RunRecord("sqlite:////home/me/mlflow.db", "1", "run").save(tmp_path / "here")
    with mirrored(tmp_path / "there", far):
        assert RunRecord.load(tmp_path / "there") is None


def test_a_password_comes_from_the_settings_of_whoever_goes_on() -> None:
    assert of_record("https://server/", "https://me:secret@server/") == "https://me:secret@server/"
    assert of_record("https://other/", "https://me:secret@server/") == "https://other/"
    assert of_record(None, "https://server/") == "https://server/"


def test_a_local_folder_has_no_copy(tmp_path: Path) -> None:
    with mirrored(tmp_path, Folder(str(tmp_path))):
        Journal(tmp_path).append([row(1)])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_are_read_where_they_are() -> None:
    assert place_of_rows("/mnt/runs") is None
    place = place_of_rows("s3://bucket/runs")
    assert place is not None and place.startswith("node:")


def test_the_reader_goes_to_its_rows_and_asks_a_head_node_for_no_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.data.read_datasource", lambda source, **how: asked.append(how))
    source = OrderSource(Order("", 0, 1, 1, batch_rows=1), 0, 1, False)
    bundles_of(source, 0.5, 1, place="node:10.0.0.1")
    bundles_of(source, 0.5, 1)
    pinned, free = asked
    assert (pinned["num_cpus"], pinned["ray_remote_args"]) == (0, {"resources": {"node:10.0.0.1": 0.001}})
    assert free["num_cpus"] == 0.5 and "ray_remote_args" not in free


@pytest.mark.parametrize(("address", "words"), [("memory://runs/none", "no recipe.yaml"), ("nobody://runs/x", "nobody")])
def test_a_folder_that_is_no_run_is_refused(address: str, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        saved_job(Folder(address))


def test_a_search_goes_on_from_its_copy_or_from_its_files_here(far: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, _, name = far.root.rpartition("/")
    told: list[str] = []
    monkeypatch.setattr(drive, "_run", lambda planned, where, display: told.append(where["storage"]))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(Refusal, match="without search.yaml"):
        drive.resume_search(far.root)
    assert not Path("runs").exists() and not far.names()
    far.child(COPY).write("search.yaml", b"search: {}")
    far.child(COPY).write("owner", b"somebody")
    drive.resume_search(far.root)
    assert (Path("runs") / name / "search.yaml").exists()
    drive.resume_search(Path("runs") / name, cluster={"storage": storage})
    assert told == [storage, storage]


# A whole run in S3


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    with s3_bucket("runs", tmp_path) as address:
        yield address


@pytest.mark.slow
def test_a_run_in_s3_is_killed_and_goes_on_from_another_folder(tmp_path: Path, bucket: str) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "model")
    tiny_model(tmp_path / "model", vocab_size=len(tokenizer))
    lines = [line for line in source_text().splitlines() if line.strip()][:200]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    content = {
        "name": "far",
        "student": str(tmp_path / "model"),
        "strategy": {"type": "logits", "top_k": 8},
        "endpoints": {"teacher": {"engine": "fake", "vocabulary": 512, "seconds_per_bundle": 0.3}},
        "data": {"train": str(tmp_path / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 48},
        "train": {"steps": STEPS, "batch_rows": 8, "lr": 3e-3, "layout": "single"},
        "checkpoint": {"every_steps": EVERY},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"storage": f"{bucket}/all", "address": "local"}))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}

    def command(folder: str, *words: str) -> subprocess.Popen[str]:
        (tmp_path / folder).mkdir()
        arguments = [sys.executable, "-m", "jobs.cli", "run", *words, "--cluster", str(tmp_path / "cluster.yaml")]
        return subprocess.Popen(
            arguments, cwd=tmp_path / folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    home = Folder(f"{bucket}/all/far")
    begun = command("first", str(tmp_path / "recipe.yaml"))
    end = time.monotonic() + 180
    while not home.exists("checkpoint_manager_snapshot.json"):
        assert begun.poll() is None and time.monotonic() < end
        time.sleep(0.3)
    begun.kill()
    begun.wait()
    rest = command("second", "--resume", home.root)
    said, _ = rest.communicate(timeout=300)
    assert rest.returncode == 0, said
    assert f"goes on after step {EVERY}" in " ".join(said.split())
    assert sorted(steps(tmp_path / "second" / "runs" / "far")) == sorted([*range(1, STEPS + 1), EVERY, 2 * EVERY, STEPS])
    result = json.loads(home.read("result.json") or b"")
    assert result["student"] == f"{home.root}/student" and home.child("student").exists("model.safetensors")
    assert home.child("driver").exists("metrics.jsonl")
