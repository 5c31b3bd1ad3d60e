"""`distill doctor` on this machine: all is well, and then not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.yaml_text import write_yaml
from jobs.doctor import examine


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "ray_config.yaml"


def test_a_sound_machine_gets_0_and_one_that_lacks_something_1(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = str(settings.parent / "runs")
    settings.write_text(write_yaml({"storage": runs}))
    assert examine(settings) == 0
    told = capsys.readouterr().out
    assert "failed" not in told
    assert all(
        name in told for name in ("versions", "compiler", "ports", "shared memory", "disk", "GPUs", "storage", "token", "Ray", "MLflow")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings.write_text(write_yaml({"storage": runs, "mlflow": {"tracking_uri": f"http://127.0.0.1:{free.getsockname()[1]}"}}))
        assert examine(settings) == 1
    told = capsys.readouterr().out
    assert "failed" in told
    assert "Start it, or set mlflow.tracking_uri" in told
