"""The doctor's checks, against real files, sockets and packages."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import health
from cluster.config import ClusterConfig
from cluster.seal import SealSettings, key_file, key_of


def test_this_environment_is_the_pinned_one() -> None:
    found = health.versions()
    assert found.state == "ok", found.says


def test_a_package_of_another_version_and_a_missing_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = ["ray==1.0", "no-such-package>=2", "torch>=1", "liger-kernel==99; extra == 'bench'"]
    monkeypatch.setattr(health, "requires", lambda package: pins)
    found = health.versions()
    assert found.state == "failed"
    assert "not ==1.0" in found.says
    assert "no-such-package missing" in found.says
    assert "torch" not in found.says
    assert "liger" not in found.says
    assert health.versions.__defaults__ == ("distill-orchestrator",)


def test_an_unknown_package_is_a_warning() -> None:
    assert health.versions("no-such-package").state == "warning"


def test_the_compiler_is_the_one_that_cxx_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert (health.compiler().state, health.compiler().says) == ("warning", "no no-such-compiler")
    monkeypatch.setenv("CXX", "sh")
    assert health.compiler().state == "ok"


def test_an_address_that_is_not_this_machine_fails() -> None:
    assert health.network("127.0.0.1").state == "ok"
    found = health.network("127.0.0.1.invalid")
    assert found.state == "failed"
    assert "firewall" in found.do


def test_shared_memory_is_measured(tmp_path: Path) -> None:
    assert health.shared_memory(tmp_path / "missing").state == "warning"
    assert health.shared_memory(tmp_path).state in ("ok", "warning")


def test_a_full_disk_fails_before_a_nearly_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "not" / "yet")
    states = []
    for limits in ((0.0, 0.0), (0.0, 1e9), (1e9, 1e9)):
        monkeypatch.setattr(health, "FREE_GIB", limits)
        states.append(health.disk(folder).state)
    assert states == ["ok", "warning", "failed"]
    assert health.disk("s3://bucket/runs").state == "ok"


def test_storage_is_written_read_and_left_clean(tmp_path: Path) -> None:
    assert health.storage(str(tmp_path / "runs")).state == "ok"
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "file").write_text("x")
    found = health.storage(str(tmp_path / "file" / "runs"))
    assert (found.state, str(tmp_path) in found.says) == ("failed", True)
    assert health.storage("nonsense://bucket/runs").state == "failed"


def test_a_token_that_others_can_read_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    file = tmp_path / "token"
    assert health.token(file).state == "ok"
    file.write_text("secret")
    file.chmod(0o644)
    assert health.token(file).do == f"chmod 600 {file}"
    file.chmod(0o600)
    assert health.token(file).state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert health.token(file).state == "warning"


def test_the_key_of_seals_is_looked_at_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert health.sealing(SealSettings()).state == "ok"
    assert not key_file().exists()
    key = key_of(SealSettings())
    found = health.sealing(SealSettings())
    assert found.state == "ok" and key.name in found.says and key.secret.decode() not in found.says
    key_file().chmod(0o644)
    assert health.sealing(SealSettings()).state == "failed"


def test_missing_secrets_are_named_and_values_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "very_secret")
    monkeypatch.delenv("B_TOKEN", raising=False)
    found = health.secrets(("A_TOKEN", "B_TOKEN"), here=True)
    assert (found.state, found.says) == ("failed", "not set: B_TOKEN")
    assert health.secrets(("A_TOKEN",), here=True).state == "ok"
    assert health.secrets(("B_TOKEN",), here=False).state == "ok"
    assert "very_secret" not in repr([found, health.secrets(("A_TOKEN",), here=True)])


def test_gpus_that_are_asked_for_must_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    asks = {"endpoints": {"big": {"engine": "fake", "vocabulary": 8, "resources": {"gpus": 1}}}}
    found = health.gpus(ClusterConfig.model_validate(asks))
    assert (found.state, "endpoints.big" in found.says) == ("failed", True)
    assert health.gpus(ClusterConfig.model_validate({**asks, "address": "auto"})).state != "failed"
    assert health.gpus(ClusterConfig()).state != "failed"


@contextmanager
def silent_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_cluster_that_does_not_answer_fails() -> None:
    with silent_port() as port:
        found = health.ray_address(f"http://127.0.0.1:{port}")
    assert (found.state, str(port) in found.says) == ("failed", True)
    assert health.ray_address("local").state == "ok"


def test_a_cluster_that_answers_is_fine(ray_session: str) -> None:
    found = health.ray_address(ray_session)
    assert found.state == "ok", found.says
