"""A search as a job on a cluster whose head node lends no CPUs, as that of every rendered cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import loopback
from cluster.loopback import NodeSize
from jobs.submit import Asked, submit
from orchestrator.search.book import Book
from tests.tiny import tiny_pair

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]

RECIPE = """
student: data/student
strategy: cross-entropy
data: {train: data/rows.jsonl, held_out_rows: 4, max_length_tokens: 64}
train: {steps: 3, batch_rows: 4, layout: single}
search:
  space:
    train.lr: {choice: [1.0e-3, 1.0e-4]}
  sampler: grid
  scheduler: none
  baseline: false
"""


@pytest.mark.slow
def test_trials_are_driven_from_a_head_that_lends_no_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pair(tmp_path / "data", rows=24)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    cluster = loopback.up(loopback.folder_of(f"search-{os.getpid()}"), [NodeSize(0), NodeSize(2)])
    try:
        assert submit(Asked("search", ("recipe.yaml", "name=found"), address=cluster.address)) == 0
    finally:
        loopback.down(cluster)
    assert [trial.outcome for trial in Book(tmp_path / "runs" / "found").trials()] == ["finished", "finished"]
