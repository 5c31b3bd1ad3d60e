"""Writing under fire: a killed driver, a killed author. No text is missing, none is twice, and what was kept is not written again."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.config import FakeEndpoint
from cluster.endpoints import make_engine
from cluster.engines.fake_server import Behaviour, FakeServer
from cluster.storage import Folder
from cluster.stores.files import StoreFiles
from orchestrator.config import load_job
from orchestrator.generate import Wrote, generate
from orchestrator.plan import make_plan
from tests.orchestrator.test_authored import fill_here, ids_of, questions
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PROMPTS, HELD_OUT, PART_PROMPTS, SAMPLES, SECONDS = 64, 4, 3, 2, 0.4
PARTS = (PROMPTS - HELD_OUT) // PART_PROMPTS
IN_FLIGHT = 5
"""Parts that may be written and not kept when a process dies: two at the author, one between, two at the writers of files."""


@dataclass(frozen=True)
class Home:
    """A recipe whose teacher is behind a URL, where every prompt that comes is counted."""

    folder: Path
    server: FakeServer

    def recipe(self, seed: int) -> dict[str, Any]:
        """Each `seed` has a store of its own."""
        teacher = {"engine": "openai", "base_url": self.server.url, "model": "fake", "vocabulary": 512}
        strategy = {"type": "verified-cot", "samples": SAMPLES, "max_new_tokens": 8, "sampling_seed": seed, "judge": "none"}
        return {
            "student": str(self.folder / "model"),
            "strategy": strategy,
            "endpoints": {"teacher": teacher},
            "data": {"train": str(self.folder / "rows.jsonl"), "held_out_rows": HELD_OUT, "max_length_tokens": 64},
            "train": {"steps": 2, "batch_rows": 8, "layout": "single"},
            "text": {"part_prompts": PART_PROMPTS},
        }

    @property
    def cluster(self) -> dict[str, Any]:
        return {"storage": str(self.folder / "runs"), "address": "auto"}

    def files(self, seed: int) -> StoreFiles | None:
        """The store of a seed, once it is begun."""
        for folder in (self.folder / "runs" / "text").glob("teacher-*"):
            files = StoreFiles(Folder(str(folder)))
            if (folder / "store.json").exists() and files.spec.key.request["seed"] == seed:
                return files
        return None

    def kept(self, seed: int) -> set[int]:
        """Parts that are complete."""
        files = self.files(seed)
        return {p.number for p in files.complete_parts()} if files else set()

    def wait_for(self, seed: int, parts: int, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while len(self.kept(seed)) < parts:
            assert time.monotonic() < end, f"only {len(self.kept(seed))} parts in time"
            time.sleep(0.05)

    def start(self, seed: int) -> subprocess.Popen[bytes]:
        """`distill generate` as a process of its own."""
        recipe, cluster = self.folder / f"{seed}.yaml", self.folder / "cluster.yaml"
        recipe.write_text(yaml.safe_dump(self.recipe(seed)))
        cluster.write_text(yaml.safe_dump(self.cluster))
        command = [sys.executable, "-m", "jobs.cli", "generate", str(recipe), "--cluster", str(cluster)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("texts")
    tiny_model(folder / "model", vocab_size=len(tiny_tokenizer(folder / "model")))
    (folder / "rows.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(PROMPTS)))
    with FakeServer(
        make_engine(FakeEndpoint(engine="fake", vocabulary=512)), behaviour=Behaviour(dialect="none", seconds=SECONDS)
    ) as server:
        yield Home(folder, server)


def asked(home: Home) -> Counter[tuple[tuple[int, ...], int]]:
    """How often each text was asked for: by its prompt and its seed."""
    return Counter((tuple(b["prompt"]), b["seed"]) for b in home.server.requests if b["max_tokens"] == 8)


def check_whole(home: Home, seed: int, wrote: Wrote, kept_before: set[int]) -> None:
    """All texts are there once, as an undisturbed call writes them; only those of parts that were not kept were asked for again."""
    files = home.files(seed)
    assert files is not None and files.finished
    files.check()
    found = ids_of(files)
    assert [(row, sample) for row, sample, _ in found] == list(itertools.product(range(PROMPTS - HELD_OUT), range(SAMPLES)))
    fresh = [p.loss_tokens for p in files.parts if p.number not in kept_before]
    assert 0 < wrote.written_tokens <= sum(fresh)
    again = asked(home)
    assert len(again) == len(found) and sum(again.values()) - len(again) <= IN_FLIGHT * PART_PROMPTS * SAMPLES
    undisturbed = replace(filling(home, seed), files=StoreFiles(Folder(str(home.folder / f"undisturbed-{seed}"))))
    fill_here(undisturbed)
    assert ids_of(undisturbed.files) == found


def filling(home: Home, seed: int) -> Any:
    """What fills the store of a seed where nothing is kept yet."""
    elsewhere = {"storage": str(home.folder / f"elsewhere-{seed}"), "address": "auto"}
    (job,) = make_plan(load_job(home.recipe(seed), (), elsewhere), "texts").writings()
    return job


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_killed_driver_leaves_what_was_written(home: Home) -> None:
    home.server.requests.clear()
    process = home.start(1)
    home.wait_for(1, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = home.kept(1)
    (wrote,) = generate(home.recipe(1), cluster=home.cluster).texts
    assert 4 <= len(before) < PARTS
    check_whole(home, 1, wrote, before)
    assert generate(home.recipe(1), cluster=home.cluster).texts[0].written_tokens == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_killed_author_costs_its_blocks(home: Home) -> None:
    """The call that lost it goes on by itself."""
    home.server.requests.clear()

    def kill() -> int:
        home.wait_for(2, 3)
        victims = [p for p in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(p.cmdline())]
        victims[0].send_signal(signal.SIGKILL)
        return len(home.kept(2))

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        (wrote,) = generate(home.recipe(2), cluster=home.cluster).texts
        assert 3 <= killed.result() < PARTS
    assert wrote.written_tokens == wrote.tokens
    check_whole(home, 2, wrote, set())
