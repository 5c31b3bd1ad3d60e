"""Whether a machine and what it is connected to are fit for runs: one small check each, none of which changes anything for long."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
import pyarrow as pa
from packaging.requirements import Requirement

from cluster import seal
from cluster.config import ClusterConfig
from cluster.inside import inside_job
from cluster.storage import Folder

GIB = 1 << 30
OBJECT_STORE_SHARE = 0.3
"""Of the machine's memory that Ray gives its object store."""
FREE_GIB = (1.0, 10.0)
"""Less free space than the first is a failure, less than the second a warning."""
TOKEN_FILE = Path("~/.ray/auth_token")
PACKAGE = "distill-orchestrator"


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    state: Literal["ok", "warning", "failed"]
    says: str
    do: str = ""
    """What to do about it; nothing when it is fine."""


def checks(config: ClusterConfig) -> Sequence[Callable[[], Finding]]:
    """Every check of this machine and of what `config` names, besides MLflow."""
    return (
        versions,
        compiler,
        network,
        shared_memory,
        lambda: disk(config.storage),
        lambda: gpus(config),
        lambda: storage(config.storage),
        lambda: token(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE).expanduser()),
        lambda: sealing(config.seal),
        lambda: secrets(config.secrets, inside_job() or config.ray_address == "local"),
        lambda: ray_address(config.ray_address),
    )


def versions(package: str = PACKAGE) -> Finding:
    """Installed packages against the pins of this one."""
    try:
        pins = [Requirement(line) for line in requires(package) or ()]
    except PackageNotFoundError:
        return Finding("versions", "warning", f"{package} is not installed, so its pins are unknown", "pip install -e .")
    wrong = []
    for pin in pins:
        if pin.marker and not pin.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(pin.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not pin.specifier.contains(found, prereleases=True):
            wrong.append(f"{pin.name} {found}, not {pin.specifier}")
    if wrong:
        return Finding("versions", "failed", "; ".join(wrong), "pip install -r requirements.txt, on every node")
    return Finding("versions", "ok", f"{len(pins)} packages as pinned, ray {version('ray')}, torch {version('torch')}")


def compiler() -> Finding:
    """What DeepSpeed compiles its operator with on CPUs."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        return Finding("compiler", "warning", f"no {name}", "Install g++ for train.layout=deepspeed on CPUs; other layouts need none.")
    return Finding("compiler", "ok", f"{name} at {shutil.which(name)}")


def network(address: str | None = None) -> Finding:
    """Whether this machine reaches itself by the address that Ray gives it: a firewall or a VPN may say no."""
    if address is None:
        from ray.util import get_node_ip_address

        address = str(get_node_ip_address())
    try:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection((address, port), timeout=3).close()
    except OSError as error:
        do = "Let this machine's own ports through its firewall, or correct its name in /etc/hosts: Ray's processes talk by it."
        return Finding("ports", "failed", f"{address} does not answer to itself ({error})", do)
    taken = [port for port in (6379, 8265) if _listens(port)]
    words = f"{address} answers on free ports"
    return Finding("ports", "ok", words + (f"; taken, as by another Ray: {', '.join(map(str, taken))}" if taken else ""))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Where Ray keeps its object store."""
    if not path.is_dir():
        return Finding("shared memory", "warning", f"no {path}: Ray keeps objects on a disk, slowly", "Mount a tmpfs there.")
    size, wanted = shutil.disk_usage(path).total, OBJECT_STORE_SHARE * psutil.virtual_memory().total
    says = f"{path} has {size / GIB:,.1f} GiB, Ray wants {wanted / GIB:,.1f}"
    if size < wanted:
        return Finding("shared memory", "warning", says, f"docker run --shm-size={wanted / GIB:.0f}g, or a larger tmpfs.")
    return Finding("shared memory", "ok", says)


def disk(where: str) -> Finding:
    """Free space below the storage folder."""
    if "://" in where:
        return Finding("disk", "ok", f"storage is elsewhere: {where}")
    there = Path(where).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / GIB
    says, do = f"{free:,.1f} GiB free at {there}", "Free some, or choose another `storage`: checkpoints are large."
    if free < FREE_GIB[1]:
        return Finding("disk", "failed" if free < FREE_GIB[0] else "warning", says, do)
    return Finding("disk", "ok", says)


def gpus(config: ClusterConfig) -> Finding:
    """Whether torch sees the GPUs that the settings ask for, and those that the driver lists."""
    import torch

    seen, listed = torch.cuda.device_count(), shutil.which("nvidia-smi") is not None
    asked = {"resources.worker": config.resources.worker.gpus} | {f"endpoints.{k}": e.resources.gpus for k, e in config.endpoints.items()}
    wanted = [name for name, amount in asked.items() if amount]
    if wanted and not seen and config.ray_address == "local":
        do = "Set their `gpus` to 0, name a cluster that has some, or install the CUDA build of torch and a driver."
        return Finding("GPUs", "failed", f"torch {torch.__version__} sees none, {', '.join(wanted)} asks for some", do)
    if listed and not seen:
        return Finding("GPUs", "warning", f"a driver is here and torch {torch.__version__} sees none", "Install the CUDA build of torch.")
    return Finding("GPUs", "ok", f"torch {torch.__version__} sees {seen}")


def storage(where: str) -> Finding:
    """Writes, reads and removes a file."""
    folder, name, content = Folder.of(where), f".doctor-{uuid.uuid4().hex}", b"distill doctor"
    try:
        folder.write(name, content)
        same = folder.read(name) == content
        folder.remove(name)
    except (OSError, pa.ArrowException, ImportError, ValueError) as error:
        do = "Correct `storage` in ray_config.yaml, or its permissions and credentials."
        return Finding("storage", "failed", f"{where}: {_line(error)}", do)
    if not same:
        return Finding("storage", "failed", f"{where} gives back other bytes than were written", "Do not use it.")
    return Finding("storage", "ok", f"wrote, read and removed a file in {where}")


def token(file: Path) -> Finding:
    """Who may use this user's clusters."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        do = "Unset RAY_AUTH_MODE, or set it to token."
        return Finding("token", "warning", "RAY_AUTH_MODE=disabled: whoever reaches Ray's ports runs code as you", do)
    if file.exists() and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding("token", "warning", f"others can read {file}", f"chmod 600 {file}")
    return Finding("token", "ok", f"{file} is private" if file.exists() else "Ray makes one when it starts")


def sealing(settings: seal.SealSettings) -> Finding:
    """The key of checkpoints; makes none."""
    if settings.key_env is None and not seal.key_file().exists():
        return Finding("seal", "ok", f"the first run makes {seal.key_file()}")
    try:
        return Finding("seal", "ok", f"checkpoints are sealed with the key {seal.key_of(settings).name}")
    except seal.NoKey as error:
        return Finding("seal", "failed", str(error), "Correct that, or name a variable with a key as seal.key_env.")


def secrets(names: Sequence[str], here: bool) -> Finding:
    """Variables that every node must have. Values are not looked at."""
    if not here:
        return Finding("secrets", "ok", f"{len(names)} named; the cluster's nodes must have them")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        return Finding("secrets", "failed", f"not set: {', '.join(missing)}", "Set them, or take them off `secrets`.")
    return Finding("secrets", "ok", f"{len(names)} named, all set")


def ray_address(address: str) -> Finding:
    """Whether a cluster answers, with the token that is set here."""
    from cluster import jobs_client

    if address == "local":
        return Finding("Ray", "ok", "runs start it on this machine")
    try:
        jobs = jobs_client.Jobs(address)
        count = len(jobs.all())
    except jobs_client.Unreachable as error:
        return Finding("Ray", "failed", f"{error.address}: {error.reason}", error.do)
    return Finding("Ray", "ok", f"{jobs.address} answers, and knows {count} jobs")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
