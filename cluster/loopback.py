"""A Ray cluster of several nodes on this machine, for trying and testing: real `ray` processes, each with an address of its own.

Nodes are 127.0.0.2, 127.0.0.3 and so on, the dashboard is 127.0.0.1. All that belongs to a cluster lies in one folder: its record, its
token, its logs and Ray's own files. Whatever a node starts inherits a mark in its environment, and only marked processes are ended.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

RECORD = "cluster.json"
TOKEN = "token"
MARK = "DISTILL_LOOPBACK"
"""Variable that all processes of a cluster carry; its value is the cluster's folder."""
START_SECONDS = 180.0
END_SECONDS = 15.0
POLL_SECONDS = 0.25
TRIES = 3
"""Starts of a node that ends as it starts: Ray gives up on itself where a busy machine takes longer than 30 seconds."""


class LoopbackError(Exception):
    """A cluster that did not start, or is in the way."""


class _Ended(LoopbackError):
    """A node that ended as it started."""


@dataclass(frozen=True)
class Process:
    """One process for ever: a pid is used again, with its start time it is not."""

    pid: int
    started: float
    """Unix seconds."""

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, psutil.Process(pid).create_time())

    def found(self) -> psutil.Process | None:
        """The process while it runs; None afterwards."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same else None


@dataclass(frozen=True)
class NodeSize:
    """What one node offers."""

    cpus: int = 2
    gpus: int = 0
    memory_mib: int = 0
    """Of its object store; 0 takes 256."""


@dataclass(frozen=True)
class Loopback:
    """A started cluster, as its record says."""

    folder: str
    address: str
    """For `ray.init`."""
    dashboard: str
    """For jobs: a URL."""
    nodes: tuple[Process, ...]
    """`ray start --block` of each node, the head first."""

    @property
    def token(self) -> str:
        return (Path(self.folder) / TOKEN).read_text(encoding="utf-8").strip()

    @property
    def environment(self) -> dict[str, str]:
        """What a program on this machine needs to join it."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(self.folder) / TOKEN)}

    @property
    def running(self) -> bool:
        """Whether its head runs."""
        return self.nodes[0].found() is not None

    def alive(self) -> list[str]:
        """Addresses of the nodes that the cluster itself counts as alive."""
        answer = _get(self.dashboard, "/api/v0/nodes", self.token)
        rows = answer.get("data", {}).get("result", {}).get("result", [])
        return sorted(row["node_ip"] for row in rows if row["state"] == "ALIVE")


def folder_of(name: str) -> Path:
    """Where the cluster of a name lies; short, because Ray makes sockets in it."""
    return Path(tempfile.gettempdir()) / f"distill-{os.getuid()}" / name


def find(folder: Path) -> Loopback | None:
    """The cluster that was started in a folder, whether it runs or not; None when there is none."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Loopback(**{**content, "nodes": tuple(Process(**node) for node in content["nodes"])})


def running() -> list[Loopback]:
    """All that run on this machine and belong to this user."""
    found = (find(record.parent) for record in sorted(folder_of("").glob(f"*/{RECORD}")))
    return [cluster for cluster in found if cluster and cluster.running]


def serving(address: str) -> Loopback | None:
    """The cluster behind an address; of `local`, the only one that runs."""
    found = running()
    if address == "local":
        return found[0] if len(found) == 1 else None
    return next((c for c in found if address.rstrip("/") in (c.address, c.dashboard, urlsplit(c.dashboard).netloc)), None)


def up(folder: Path, sizes: Sequence[NodeSize]) -> Loopback:
    """Starts a head of the first size and a node of each other; returns when all are alive.

    Raises `LoopbackError` when one runs in the folder already, or a node does not come up; then what was started is ended.
    """
    known = find(folder)
    if known and known.running:
        raise LoopbackError(f"a cluster runs in {folder} already")
    if known:
        down(known)
    for place in (folder.parent, folder):
        _take(place)
    _write_private(folder / TOKEN, secrets.token_hex(32))
    gcs, dashboard, client = _free_ports(3)
    head = ["--head", "--port", str(gcs), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    head += ["--ray-client-server-port", str(client), "--include-dashboard", "true"]
    cluster = Loopback(str(folder), f"{_address(0)}:{gcs}", f"http://127.0.0.1:{dashboard}", ())
    try:
        cluster = _with(cluster, 0, _start(folder, 0, head, sizes[0]))
        _await_node(cluster, 0)
        for number, size in enumerate(sizes[1:], 1):  # all of them at once
            cluster = _with(cluster, number, _worker(cluster, number, size))
        for number, size in enumerate(sizes[1:], 1):
            cluster = _joined(cluster, number, size)
    except BaseException:
        down(cluster)
        raise
    return cluster


def join(cluster: Loopback, size: NodeSize) -> Loopback:
    """Starts one more node of a running cluster; the cluster with it, once it is alive. `LoopbackError` when it does not come up."""
    number = len(cluster.nodes)
    return _joined(_with(cluster, number, _worker(cluster, number, size)), number, size)


def _joined(cluster: Loopback, number: int, size: NodeSize) -> Loopback:
    """The cluster once a started node of it is alive; one that ends as it starts is started again."""
    for _ in range(TRIES - 1):
        try:
            return _await_node(cluster, number)
        except _Ended:
            cluster = _with(cluster, number, _worker(cluster, number, size))
    return _await_node(cluster, number)


def _with(cluster: Loopback, number: int, node: Process) -> Loopback:
    """The cluster with a new node, or one in another's place, which goes into its record."""
    changed = replace(cluster, nodes=(*cluster.nodes[:number], node, *cluster.nodes[number + 1 :]))
    _write_private(Path(cluster.folder) / RECORD, json.dumps(asdict(changed)))
    return changed


def _worker(cluster: Loopback, number: int, size: NodeSize) -> Process:
    return _start(Path(cluster.folder), number, ["--address", cluster.address], size)


def down(cluster: Loopback) -> list[int]:
    """Ends the cluster's processes and removes its folder; the pids that were ended. Processes of others are never touched."""
    before = _marked(cluster.folder)
    nodes = [process for node in reversed(cluster.nodes) if (process := node.found())]
    for process in nodes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    psutil.wait_procs(nodes, timeout=END_SECONDS)  # each ends its own first
    left = _marked(cluster.folder)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=END_SECONDS)
    shutil.rmtree(cluster.folder, ignore_errors=True)
    return sorted(process.pid for process in {*before, *left})


def processes(cluster: Loopback) -> list[int]:
    """Pids of everything that belongs to the cluster: nodes, workers, jobs."""
    return sorted(process.pid for process in _marked(cluster.folder))


def _take(folder: Path) -> None:
    """A folder that nobody else can put things into; `/tmp` is everybody's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise LoopbackError(f"{folder} belongs to somebody else")


def _marked(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _address(number: int) -> str:
    return f"127.0.0.{number + 2}"


def _start(folder: Path, number: int, words: Sequence[str], size: NodeSize) -> Process:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words]
    command += ["--node-ip-address", _address(number), "--num-cpus", str(size.cpus), "--num-gpus", str(size.gpus)]
    command += ["--object-store-memory", str((size.memory_mib or 256) << 20), "--dashboard-agent-listen-port", "0"]
    command += ["--temp-dir", str(folder / str(number))]  # nodes that share one take each other's working_dir away
    command += ["--min-worker-port", "0", "--max-worker-port", "0"]  # any free one: nodes share the machine's
    with (folder / f"node-{number}.log").open("wb") as log:
        child = subprocess.Popen(
            command, env=_environment(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    return Process.of(child.pid)


def _environment(folder: Path) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")}
    here = str(Path(sys.executable).parent)  # so that a job's `python` is this one
    end = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # else a node that is told to end first waits half a minute for its work
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN)}
    return {**end, **kept, **token, MARK: str(folder), "PATH": f"{here}{os.pathsep}{kept.get('PATH', os.defpath)}"}


def _await_node(cluster: Loopback, number: int) -> Loopback:
    """The same cluster, once the node is alive."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        if cluster.nodes[number].found() is None:
            raise _Ended(f"node {number} ended as it started: {_last_words(Path(cluster.folder) / f'node-{number}.log')}")
        with suppress(OSError, ValueError):
            if _address(number) in cluster.alive():
                return cluster
        if time.monotonic() > deadline:
            raise LoopbackError(f"node {number} was not up within {START_SECONDS:g} seconds; logs are in {cluster.folder}")
        time.sleep(POLL_SECONDS)


def _get(url: str, path: str, token: str) -> dict[str, Any]:
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; another program may still be faster."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _write_private(path: Path, content: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(content)


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "without a word"
