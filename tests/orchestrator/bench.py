"""A good recipe at a bench, and the ways in which tests spoil it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.checks import machine, room
from orchestrator.config import Job, load_job
from orchestrator.errors import Refusal
from orchestrator.plan import Plan, make_plan
from strategies.core import Strategy, StrategyConfig

Recipe = dict[str, Any]
ROWS = 40
"""Rows of the good recipe."""
TEXT = "def f(x):\n    return [x, '{}']\n"


@dataclass(frozen=True)
class Bench:
    """A good recipe and what a test may do to it."""

    folder: Path
    recipe: Recipe
    cluster: dict[str, Any]
    patch: pytest.MonkeyPatch

    @property
    def storage(self) -> Path:
        return Path(self.cluster["storage"])

    def copy(self, name: str, to: str) -> Path:
        """A model folder of this test's own, free to be spoilt."""
        return Path(shutil.copytree(self.folder / name, self.storage.parent / to))

    def rows(self, *rows: object) -> str:
        path = self.storage.parent / "own.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(path)

    def job(self, *overrides: str) -> Job:
        return load_job(self.recipe, overrides, self.cluster)

    def plan(self, *overrides: str) -> Plan:
        return make_plan(self.job(*overrides), "tiny")

    def refusal_of(self, strategy: Strategy) -> str:
        """What is said of a strategy that somebody wrote in Python."""

        class Own(StrategyConfig):
            type: str = "own"

            def build(self) -> Strategy:
                return strategy

        job = self.job()
        with pytest.raises(Refusal) as caught:
            make_plan(Job(run=job.run.model_copy(update={"strategy": Own(), "endpoints": {}}), cluster=job.cluster), "own")
        return str(caught.value)


def put(path: str, value: object) -> Callable[[Bench], None]:
    """Breaks a recipe by one setting."""

    def change(bench: Bench) -> None:
        here = bench.recipe
        *parents, last = path.split(".")
        for key in parents:
            here = here.setdefault(key, {})
        here[last] = value

    return change


def both(*changes: Callable[[Bench], None]) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        for one in changes:
            one(bench)

    return change


def cluster(**settings: Any) -> Callable[[Bench], None]:
    return lambda bench: bench.cluster.update(settings)


def without(package: str) -> Callable[[Bench], None]:
    found = importlib.util.find_spec

    def hide(bench: Bench) -> None:
        bench.patch.setattr(machine, "find_spec", lambda name: None if name == package else found(name))

    return hide


def without_program(bench: Bench) -> None:
    bench.patch.setattr(machine.shutil, "which", lambda name: None)


def machine_of(cpus: int = 64, memory: int = 1 << 36) -> Callable[[Bench], None]:
    def pretend(bench: Bench) -> None:
        bench.patch.setattr(machine, "machine_cpus", lambda: cpus)
        bench.patch.setattr(machine, "machine_memory", lambda: memory)

    return pretend


def gpus(count: int) -> Callable[[Bench], None]:
    def pretend(bench: Bench) -> None:
        bench.patch.setattr(machine.torch.cuda, "device_count", lambda: count)
        bench.patch.setattr(machine.torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=1 << 36))

    return pretend


def data_of(*rows: object) -> Callable[[Bench], None]:
    return lambda bench: put("data.train", bench.rows(*rows))(bench)


def spoilt(who: str, spoil: Callable[[Path], object]) -> Callable[[Bench], None]:
    """The student or the teacher with something wrong in its folder."""

    def change(bench: Bench) -> None:
        own = bench.copy(who, f"spoilt-{who}")
        spoil(own)
        put("student.model" if who == "student" else "endpoints.teacher.model", str(own))(bench)

    return change


def edit(**settings: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_ids(folder: Path) -> None:
    """The same number of tokens, two of them exchanged."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(content))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")


def run_called(name: str, finished: bool) -> Callable[[Bench], None]:
    def make(bench: Bench) -> None:
        folder = bench.storage / name
        folder.mkdir(parents=True)
        if finished:
            (folder / "result.json").write_text("{}")
        put("name", name)(bench)

    return make


def storage_below_a_file(bench: Bench) -> None:
    (bench.storage.parent / "file").write_text("")
    bench.cluster["storage"] = str(bench.storage.parent / "file" / "runs")


def storage_of_another(bench: Bench) -> None:
    bench.patch.setattr(machine.os, "access", lambda path, mode: False)


def bundles_of_a_tebibyte(bench: Bench) -> None:
    bench.patch.setattr(room, "stream_bytes", lambda *given: 1 << 40)


def full_disk(bench: Bench) -> None:
    usage = namedtuple("usage", "total used free")
    bench.patch.setattr(machine.shutil, "disk_usage", lambda path: usage(100, 100, 1000))


def messages_with_another_template(bench: Bench) -> None:
    turns = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "That is 3."}]
    both(data_of(*[{"messages": turns}] * 20), spoilt("teacher", other_template))(bench)


def own_model(config: Any) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        folder = bench.copy("student", "other-kind")
        config.save_pretrained(folder)
        put("student.model", str(folder))(bench)

    return change


WORKERS_2 = both(put("train.layout.type", "ddp"), put("train.workers", 2))
DEEPSPEED = both(put("train.layout.type", "deepspeed"), put("train.workers", 1))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.is_dir() else set()
