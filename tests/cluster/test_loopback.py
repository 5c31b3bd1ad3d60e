"""A cluster on loopback is found by its record, and only what belongs to it is ended. Starting one is in tests/jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster import loopback
from cluster.loopback import MARK, RECORD, TOKEN, Loopback, LoopbackError, NodeSize, Process


@pytest.fixture
def sleeper() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test starts; none survives it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def sleep(started: list[subprocess.Popen[bytes]], mark: str | None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **({MARK: mark} if mark else {})}
    started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment))
    return started[-1]


def recorded(folder: Path, *nodes: Process) -> Loopback:
    folder.mkdir()
    (folder / TOKEN).write_text("abc\n")
    cluster = Loopback(str(folder), "127.0.0.2:1", "http://127.0.0.1:2", nodes)
    (folder / RECORD).write_text(json.dumps(asdict(cluster)))
    return cluster


def test_down_ends_what_carries_the_mark_and_nothing_else(tmp_path: Path, sleeper: list[subprocess.Popen[bytes]]) -> None:
    folder = tmp_path / "mine"
    node, orphan = sleep(sleeper, str(folder)), sleep(sleeper, str(folder))
    foreign, neighbour = sleep(sleeper, None), sleep(sleeper, str(tmp_path / "other"))
    cluster = recorded(folder, Process.of(node.pid))
    assert loopback.find(folder) == cluster
    assert cluster.running
    assert cluster.token == "abc"
    assert loopback.processes(cluster) == sorted([node.pid, orphan.pid])
    assert set(loopback.down(cluster)) == {node.pid, orphan.pid}
    assert loopback.processes(cluster) == []
    assert [foreign.poll(), neighbour.poll()] == [None, None]
    assert not folder.exists()
    assert loopback.find(folder) is None


def test_a_pid_that_another_process_has_now_is_left_alone(tmp_path: Path, sleeper: list[subprocess.Popen[bytes]]) -> None:
    stranger = sleep(sleeper, None)
    earlier = replace(Process.of(stranger.pid), started=Process.of(stranger.pid).started - 60)
    assert earlier.found() is None
    cluster = recorded(tmp_path / "mine", earlier)
    assert not cluster.running
    assert loopback.down(cluster) == []
    assert stranger.poll() is None


def test_a_cluster_is_known_by_each_of_its_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = recorded(tmp_path / "one", Process.of(os.getpid()))
    two = replace(one, address="127.0.0.2:3", dashboard="http://127.0.0.1:4")
    monkeypatch.setattr(loopback, "running", lambda: [one])
    for address in ("local", "127.0.0.2:1", "http://127.0.0.1:2", "http://127.0.0.1:2/", "127.0.0.1:2"):
        assert loopback.serving(address) == one
    assert loopback.serving("http://elsewhere:8265") is None
    monkeypatch.setattr(loopback, "running", lambda: [one, two])
    assert loopback.serving("local") is None  # which one?
    assert loopback.serving("http://127.0.0.1:4") == two


def test_the_token_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    loopback._write_private(tmp_path / TOKEN, "secret")
    assert (tmp_path / TOKEN).stat().st_mode & 0o777 == 0o600


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(loopback.LoopbackError, match="somebody else"):
        loopback.up(tmp_path / "link", [loopback.NodeSize()])
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(loopback.LoopbackError, match="somebody else"):
        loopback.up(tmp_path / "mine", [loopback.NodeSize()])


@pytest.mark.parametrize("bad_starts", [1, 2, 3])
def test_a_node_that_ends_as_it_starts_is_started_again(
    tmp_path: Path, sleeper: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, bad_starts: int
) -> None:
    cluster, starts = recorded(tmp_path / "mine", Process.of(os.getpid())), list[int]()

    def start(folder: Path, number: int, words: Sequence[str], size: NodeSize) -> Process:
        starts.append(number)
        node = sleep(sleeper, None)
        (folder / f"node-{number}.log").write_text("timed out during startup")
        return replace(Process.of(node.pid), started=0.0) if len(starts) <= bad_starts else Process.of(node.pid)

    monkeypatch.setattr(loopback, "_start", start)
    monkeypatch.setattr(Loopback, "alive", lambda cluster: ["127.0.0.2", "127.0.0.3"])
    if bad_starts == loopback.TRIES:
        with pytest.raises(LoopbackError, match="node 1 ended as it started: timed out"):
            loopback.join(cluster, NodeSize(cpus=1))
    else:
        joined = loopback.join(cluster, NodeSize(cpus=1))
        assert loopback.find(tmp_path / "mine") == joined and joined.nodes[1].found() is not None
    assert starts == [1] * min(bad_starts + 1, loopback.TRIES)
