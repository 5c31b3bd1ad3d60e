"""Checks of what a run runs on: packages, processors, memory, disk, and the folder it writes to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil
import pyarrow as pa
import torch
from pyarrow import fs

from cluster.config import ClusterConfig
from cluster.resources import Demand, machine_cpus
from cluster.storage import Folder
from orchestrator.config import Job, TrainConfig
from orchestrator.errors import Refusal
from orchestrator.layouts import layout_facts
from orchestrator.memory import Disk, Memory
from orchestrator.sealing import check_key

LOCAL = "local"
OBJECT_STORE_SHARE = 0.3
"""Share of the machine's memory that Ray gives its object store."""
GIB = 1 << 30


def check_packages(train: TrainConfig, cluster: ClusterConfig) -> None:
    """What the layout imports or compiles is installed, and the key of checkpoints, if there is one, can be used."""
    check_key(cluster)
    gpus = cluster.resources.worker.gpus
    facts, where = layout_facts(train.layout), f"train.layout={train.layout.type}"
    if facts.package and find_spec(facts.package) is None:
        do = f"pip install {facts.package} on every node, or choose another layout."
        raise Refusal(where, f"no package {facts.package!r}", "the package this layout runs on", do)
    if facts.compiles_on_cpu and not gpus:
        compiler = os.environ.get("CXX", "g++")
        missing = [name for name, there in {compiler: shutil.which(compiler), "ninja": _ninja()}.items() if not there]
        if missing:
            do = "Install g++ and ninja on every node, or choose another layout."
            raise Refusal(where, f"no {missing[0]}", "a C++ compiler and ninja, with which it builds its communication on CPUs", do)


def _ninja() -> bool:
    return shutil.which("ninja") is not None or find_spec("ninja") is not None


def is_local(job: Job) -> bool:
    """Whether the run starts Ray on this machine, whose size is then known."""
    return job.cluster.ray_address == LOCAL


def check_processors(job: Job, demands: Sequence[Demand]) -> None:
    """Every long-lived process gets its CPUs and GPUs at once; too few stall a stream without a word."""
    worker, workers = job.cluster.resources.worker.gpus, job.run.train.most_workers
    if 0 < worker < 1 < workers:
        do = "Set it to 1, or train.workers=1. Endpoints may share a GPU."
        raise Refusal("resources.worker.gpus", f"{worker:g} with {workers} workers", "whole GPUs, which NCCL asks for", do)
    if not is_local(job):
        return
    cpus = sum(d.processes * d.share.cpus for d in demands)
    if cpus > machine_cpus() + 1e-9:
        listed = ", ".join(f"{d.role} {d.processes} x {d.share.cpus:g}" for d in demands)
        do = "Lower train.workers, an endpoint's actors or resources.*.cpus, or join a larger cluster."
        raise Refusal("resources", f"{cpus:g} logical CPUs ({listed})", f"at most the {machine_cpus()} of this machine", do)
    gpus, there = sum(d.processes * d.share.gpus for d in demands), torch.cuda.device_count()
    if gpus > there:
        listed = ", ".join(f"{d.role} {d.processes} x {d.share.gpus:g}" for d in demands if d.share.gpus)
        do = "Lower resources.*.gpus (fractions let endpoints share one), train.workers or actors, or join a larger cluster."
        raise Refusal("resources", f"{gpus:g} GPUs ({listed})", f"at most the {there} of this machine", do)


def check_storage(storage: str) -> None:
    """The storage setting is a folder that can be written, or an address that pyarrow knows."""
    where = "storage"
    if "://" in storage:
        try:
            fs.FileSystem.from_uri(storage)
        except (pa.ArrowException, OSError, ValueError) as error:
            problem = " ".join(str(error).split())[:200]
            do = "Correct storage in ray_config.yaml."
            raise Refusal(where, f"{storage!r} ({problem})", "a folder, or a URI such as s3://bucket/runs", do) from error
        return
    above = existing(Path(storage).absolute())
    if not above.is_dir():
        raise Refusal(where, f"{storage!r}, where {str(above)!r} is a file", "a folder", "Correct storage in ray_config.yaml.")
    if not os.access(above, os.W_OK | os.X_OK):
        do = "Change its owner or mode, or set storage in ray_config.yaml to a folder of yours."
        raise Refusal(where, f"{storage!r}, where {str(above)!r} may not be written", "a folder that can be written", do)


def check_folders_free(folders: Iterable[Folder], result: str) -> None:
    """No run of the name exists: a second one would go on from its checkpoints."""
    for folder in folders:
        if not folder.exists():
            continue
        got = f"{folder.root}, where {'a finished' if folder.exists(result) else 'an unfinished'} run lies"
        go_on = "" if folder.exists(result) else f"To go on with it: distill run --resume {folder.root}. "
        raise Refusal("name", got, "a folder that does not exist", f"{go_on}Otherwise choose another name, or remove the folder.")


def existing(path: Path) -> Path:
    """The path itself or the nearest thing above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def check_disk(storage: str, disk: Disk) -> None:
    """Room for everything the run writes, and for a checkpoint's parts on their way there."""
    wanted: dict[int, tuple[Path, int]] = {}
    places = [(Path(tempfile.gettempdir()), disk.checkpoint)]
    if "://" not in storage:
        places.insert(0, (existing(Path(storage).absolute()), disk.needed))
    for place, size in places:
        device = place.stat().st_dev
        first, before = wanted.get(device, (place, 0))
        wanted[device] = (first, before + size)
    for place, size in wanted.values():
        free = shutil.disk_usage(place).free
        if size > free:
            do = "Free some, set storage in ray_config.yaml elsewhere, or lower checkpoint.keep."
            expected = f"{text(size)} for checkpoints, the exported student and held-out scores"
            raise Refusal(f"disk of {place}", f"{text(free)} free", expected, do)


def check_memory(job: Job, memory: Sequence[Memory], stream: int) -> list[str]:
    """The processes fit together into this machine, and bundles under way into half of Ray's object store."""
    if not is_local(job):
        return []
    there = machine_memory()
    room = int(OBJECT_STORE_SHARE * there) // 2
    if stream > room:
        do = "Lower train.read_ahead_bundles, train.batch_rows or the strategy's top_k."
        raise Refusal(
            "train.read_ahead_bundles", f"{text(stream)} of bundles under way", f"at most half of Ray's object store, {text(room)}", do
        )
    wanted = sum(m.host * m.processes for m in memory)
    if wanted > there:
        listed = ", ".join(f"{m.role} {m.processes} x {text(m.host)}" for m in memory)
        do = "Lower train.micro_batch_tokens, train.workers or actors, shard the student with fsdp2, or use gradient_checkpointing."
        raise Refusal("memory", f"{text(wanted)} ({listed})", f"at most the {text(there)} of this machine", do)
    warnings = [f"memory: {text(wanted)} of {text(there)} will be in use."] if wanted > 0.85 * there else []
    return warnings + _about_gpus(memory) + _about_idle_gpus(memory)


def _about_idle_gpus(memory: Sequence[Memory]) -> list[str]:
    """Workers take no GPU unless they are told to, and a run on CPUs looks like a slow one on GPUs."""
    there, on_cpu = torch.cuda.device_count(), any(m.role == "worker" and not m.on_gpu for m in memory)
    do = "set resources.worker.gpus in ray_config.yaml."
    return [f"training workers take none of the {there} GPUs here; {do}"] if there and on_cpu else []


def _about_gpus(memory: Sequence[Memory]) -> list[str]:
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    tight = [m for m in memory if m.on_gpu and sizes and m.device > min(sizes)]
    return [f"memory: each {m.role} may need {text(m.device)} of a GPU that has {text(min(sizes))}." for m in tight]


def machine_memory() -> int:
    """Bytes of memory this machine or container has."""
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text(encoding="ascii").strip() if limit.exists() else ""
    total = int(psutil.virtual_memory().total)
    return min(total, int(given)) if given.isdigit() else total


def text(size: float) -> str:
    """A size in bytes as a person reads it."""
    units = {"GiB": GIB, "MiB": 1 << 20, "KiB": 1 << 10}
    unit, scale = next(((u, s) for u, s in units.items() if size >= s), ("KiB", 1 << 10))
    return f"{size / scale:.{1 if unit == 'GiB' else 0}f} {unit}"
