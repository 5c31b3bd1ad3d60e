"""A cluster of two nodes on loopback: it takes jobs and tokens, a submitted run ends in MLflow, and nothing is left of it."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import loopback
from cluster.jobs_client import Jobs, Unreachable
from cluster.loopback import Loopback, NodeSize
from cluster.package import Tree
from jobs.submit import Asked, submit
from jobs.submitted import run_of
from orchestrator.delivery import connect
from orchestrator.roundtrip import JOB_TAG, page_of_job
from tests.tiny import tiny_pair

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]

RECIPE = """
student: data/student
strategy: {type: logits, teacher: teacher, top_k: 8}
endpoints:
  teacher: {engine: fake, vocabulary: 512}
data: {train: data/rows.jsonl, held_out_rows: 4, max_length_tokens: 64}
train: {steps: 3, batch_rows: 4, workers: 2, layout: ddp, lr: 1.0e-3}
"""
SECRET = "sk-very-secret-of-the-nodes"
SETTINGS = "secrets: [OF_NODES_TOKEN]\nresources: {worker: {cpus: 1.5}, placement: spread}\nenvironment: {HF_HUB_OFFLINE: '1'}\n"
"""A worker has room beside the teacher, and two workers have none on one node."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Loopback]:
    """Two nodes of two CPUs whose processes import this repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("OF_NODES_TOKEN", SECRET)
        started = loopback.up(loopback.folder_of(f"test-{os.getpid()}"), [NodeSize(2), NodeSize(2)])
        yield started
        loopback.down(started)


PROGRAM = """
import ray, time
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=2)
def node():
    time.sleep(1)
    return ray.util.get_node_ip_address()

print("nodes", sorted(ray.get([node.remote(), node.remote()])))
"""


def test_a_job_runs_on_both_nodes_for_whoever_has_the_token(cluster: Loopback, tmp_path: Path) -> None:
    assert cluster.alive() == ["127.0.0.2", "127.0.0.3"]
    assert [c.address for c in loopback.running() if c == cluster] == [cluster.address]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "program.py").write_text(PROGRAM)
    Tree.of(tmp_path / "tree").write(tmp_path / "tree.zip", {})
    jobs, told = Jobs(cluster.address), list[str]()
    jobs.submit("both", "exec python program.py", tmp_path / "tree.zip", {}, {})
    assert jobs.follow("both", told.append).outcome == 0
    assert "nodes ['127.0.0.2', '127.0.0.3']" in "".join(told)


@pytest.mark.slow
def test_a_submitted_run_is_followed_to_its_end_and_linked_with_mlflow(
    cluster: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_pair(tmp_path / "data", rows=40)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "ray_config.yaml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    assert submit(Asked("run", ("recipe.yaml", "name=first"), address=cluster.address)) == 0
    assert "step 3/3" in capfd.readouterr().out
    assert (tmp_path / "runs" / "first" / "student" / "model.safetensors").exists()
    job = next(job for job in Jobs(cluster.dashboard).all() if job.metadata.get("run_folder"))
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    (run,) = connect(uri).search_runs(["1"])
    assert (run.info.status, run.data.tags[JOB_TAG]) == ("FINISHED", job.id)
    assert run.info.run_id in run_of(job)["MLflow"]
    assert run.info.run_id in (page_of_job(uri, "distill", job.id) or "")
    logs = [folder / "session_latest" / "logs" for folder in Path(cluster.folder).glob("[0-9]*")]
    assert len(logs) == 2
    assert all(not holding(secret, tmp_path / "runs", *logs) for secret in (SECRET, cluster.token))


def holding(text: str, *folders: Path) -> list[Path]:
    """Files that a text stands in."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    return [path for path in files if text.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_run_that_is_refused_there_gives_its_exit_code_to_whoever_waits(
    cluster: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    assert submit(Asked("run", ("recipe.yaml",), address=cluster.address, retries=2)) == 2  # no model, no data; not tried again


def test_nothing_is_left_of_a_cluster_that_was_ended(cluster: Loopback) -> None:
    """Last in this file: the others are done with the cluster."""
    assert len(loopback.processes(cluster)) > 6
    ended = loopback.down(cluster)
    assert len(ended) > 6
    assert loopback.processes(cluster) == []
    assert not Path(cluster.folder).exists()
    with pytest.raises(Unreachable):
        Jobs(cluster.dashboard)
