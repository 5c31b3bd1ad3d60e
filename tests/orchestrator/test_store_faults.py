"""Stores under fire: killed drivers and scorers, two jobs at once, a store in S3. No row is missing, none is twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.storage import Folder
from cluster.stores.files import StoreFiles
from orchestrator.generate import generate
from orchestrator.run import distill
from tests.s3 import s3_bucket
from tests.tiny import source_text, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
ROWS, PART_TOKENS, SECONDS = 300, 300, 0.3
"""Some twenty parts, each of which the scorer takes its time for."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    tokenizer = tiny_tokenizer(folder / "model")
    tiny_model(folder / "model", vocab_size=len(tokenizer))
    lines = [line for line in source_text().splitlines() if line.strip()][:ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def recipe(home: Path, top_k: int = 8, **more: Any) -> dict[str, Any]:
    """Each `top_k` has a store of its own."""
    return {
        "student": str(home / "model"),
        "strategy": {"type": "logits", "top_k": top_k},
        "endpoints": {"teacher": {"engine": "fake", "vocabulary": 512, "seconds_per_bundle": SECONDS}},
        "data": {"train": str(home / "rows.jsonl"), "held_out_rows": 16, "max_length_tokens": 48},
        "train": {"steps": 12, "batch_rows": 8, "lr": 3e-3, "layout": "single"},
        "signals": {"mode": "store", "codec": "exact", "part_tokens": PART_TOKENS},
    } | more


def cluster(home: Path) -> dict[str, Any]:
    return {"storage": str(home / "runs"), "address": "auto"}


def start(home: Path, name: str, content: dict[str, Any]) -> subprocess.Popen[str]:
    """`distill generate` as a process of its own."""
    (home / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (home / "cluster.yaml").write_text(yaml.safe_dump(cluster(home)))
    command = [sys.executable, "-m", "jobs.cli", "generate", str(home / f"{name}.yaml"), "--cluster", str(home / "cluster.yaml")]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ.copy())


def parts_there(home: Path, top_k: int) -> int:
    """Complete parts of the store of `top_k`."""
    for folder in (home / "runs" / "signals").glob("teacher-*"):
        files = StoreFiles(Folder(str(folder)))
        if (folder / "store.json").exists() and files.spec.key.request["top_k"] == top_k:
            return len(files.parts) if files.finished else len(files.complete_parts())
    return 0


def wait_for_parts(home: Path, top_k: int, count: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while parts_there(home, top_k) < count:
        assert time.monotonic() < end, f"only {parts_there(home, top_k)} parts in time"
        time.sleep(0.1)


def rows_of(files: StoreFiles) -> list[int]:
    """Ids of all rows in all parts."""
    import pyarrow as pa

    home = Path(files.folder.root)
    return [i for p in files.parts for i in pa.ipc.open_file(str(home / p.file)).read_all().column("row_id").to_pylist()]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_killed_driver_leaves_what_was_scored(home: Path) -> None:
    process = start(home, "driver", recipe(home, top_k=8))
    wait_for_parts(home, 8, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = parts_there(home, 8)
    (kept,) = generate(recipe(home, top_k=8), cluster=cluster(home)).signals
    files = StoreFiles(Folder(kept.folder))
    assert rows_of(files) == list(range(files.spec.rows))
    fresh = sum(p.tokens for p in files.parts) - kept.scored_tokens
    assert fresh >= 0.8 * sum(p.tokens for p in files.parts[:before])  # all that was complete when the next call began
    assert generate(recipe(home, top_k=8), cluster=cluster(home)).signals[0].scored_tokens == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_killed_scorer_costs_its_blocks(home: Path) -> None:
    def kill() -> int:
        wait_for_parts(home, 7, 3)
        victims = [p for p in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(p.cmdline())]
        victims[0].send_signal(signal.SIGKILL)
        return victims[0].pid

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        (kept,) = generate(recipe(home, top_k=7), cluster=cluster(home)).signals
        assert killed.result()
    files = StoreFiles(Folder(kept.folder))
    files.check()
    assert rows_of(files) == list(range(files.spec.rows))
    assert kept.scored_tokens == sum(p.tokens for p in files.parts)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_jobs_that_want_one_store_share_the_work(home: Path) -> None:
    slow = {"endpoints": {"teacher": {"engine": "fake", "vocabulary": 512, "seconds_per_bundle": 2.0}}}
    first = start(home, "first", recipe(home, top_k=6, **slow))
    wait_for_parts(home, 6, 1)
    second = start(home, "second", recipe(home, top_k=6, **slow))
    said = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "waiting for it" in said[1] and "waiting for it" not in said[0]
    (folder,) = [f for f in (home / "runs" / "signals").glob("*") if StoreFiles(Folder(str(f))).spec.key.request["top_k"] == 6]
    files = StoreFiles(Folder(str(folder)))
    assert rows_of(files) == list(range(files.spec.rows))
    assert sorted(p.suffix for p in folder.iterdir()).count(".arrow") == files.spec.parts


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_run_from_a_store_learns_as_one_from_the_teacher(home: Path) -> None:
    """Filled by the run itself with exact numbers; its neighbours in a forward differ, and so does the last digit."""
    quick = {"endpoints": {"teacher": {"engine": "fake", "vocabulary": 512}}}

    def losses(name: str, mode: str) -> dict[int, float]:
        content = recipe(home, top_k=5, name=name, **quick)
        content["signals"]["mode"] = mode
        distill(content, cluster=cluster(home))
        rows = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        return {r["step"]: r["values"]["loss"] for r in rows if "loss" in r["values"]}

    live, filled = losses("live", "live"), losses("filled", "store")
    assert len(live) == 12 and filled == pytest.approx(live, rel=1e-6)
    facts = json.loads((home / "runs" / "filled" / "plan.json").read_text())["fingerprints"]
    assert len(facts["signals.teacher"]) == 16


# A store in S3


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_bucket("signals", tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.mark.slow
def test_a_store_in_s3_is_filled_resumed_and_read(home: Path, bucket: str) -> None:
    """In processes of their own, whose Ray knows the bucket's server: a killed call, the rest, and a run from it."""
    content = recipe(home, top_k=4)
    content["signals"]["folder"] = f"{bucket}/stores"
    alone = {"storage": str(home / "runs"), "address": "local"}
    (home / "s3.yaml").write_text(yaml.safe_dump(content))
    (home / "alone.yaml").write_text(yaml.safe_dump(alone))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def command(*words: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-m", "jobs.cli", *words, str(home / "s3.yaml"), "--cluster", str(home / "alone.yaml")]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    begun = command("generate")
    stores = Folder(f"{bucket}/stores")
    end = time.monotonic() + 180
    while not any(stores.child(n).exists("part-000003.json") for n in stores.names()):
        assert begun.poll() is None and time.monotonic() < end
        time.sleep(0.3)
    begun.kill()
    begun.wait()
    (name,) = stores.names()
    files = StoreFiles(stores.child(name))
    before = len(files.complete_parts())
    rest = command("generate")
    said, _ = rest.communicate(timeout=300)
    assert rest.returncode == 0, said
    asked = re.search(rf"for (\d+) of {files.spec.parts} parts", said)
    assert asked is not None and 0 < int(asked[1]) <= files.spec.parts - before < files.spec.parts
    run = command("run")
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert "is there whole" in " ".join(said.split())
    cached = list((home / "runs" / "stores-cache").rglob("*.arrow"))
    assert cached and len(cached) <= files.spec.parts
