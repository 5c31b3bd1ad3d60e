"""The benchmarks can be listed, imported and run small. What they measure is never asserted here."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from orchestrator.config import load_job
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.__main__ import listing
from tests.benchmarks.bare_loop import train
from tests.benchmarks.figure import Figure, machine
from tests.benchmarks.loop import LoopSpec, prepare_rows
from tests.benchmarks.material import Material, make
from tests.benchmarks.product import ROOT, Setup, recipe
from tests.benchmarks.train_vs_bare import ALTERNATIVES, SHIPPED
from tests.benchmarks.window import Trace, Window


def test_the_list_names_every_benchmark_with_its_target() -> None:
    shown = listing()
    assert all(name in shown and entry.line in shown and entry.target in shown for name, entry in BENCHMARKS.items())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_imports_and_answers_to_its_name(name: str) -> None:
    module = import_module(BENCHMARKS[name].home)
    assert name == module.NAME
    assert callable(module.measure)


def test_tokens_per_second_leaves_out_warm_up_and_cool_down() -> None:
    trace = Trace(times=(9.0, 10.0, 11.0, 12.0, 20.0), tokens=(1000, 1000, 30, 50, 7), losses=(1.0,) * 5)
    assert trace.tokens_per_second(Window(warm_up=2, measured=2, cool_down=1)) == 40.0


def test_a_trace_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 steps; expected 5"):
        Trace((1.0, 2.0, 3.0), (1, 1, 1), (1.0,) * 3).tokens_per_second(Window(2, 2, 1))


def test_a_figure_is_one_line_of_json_with_what_it_was_measured_on() -> None:
    line = Figure("n", 1.0, "s", "nothing", "<= 2 s", machine()).line()
    found = json.loads(line)
    assert "\n" not in line
    assert {"name", "value", "unit", "against", "target"} < set(found)
    assert {"cpu", "cores", "versions", "load"} < set(found["measured"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoopSpec:
    folder = tmp_path_factory.mktemp("material")
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 4 for i in range(40)]
    material = make(folder, [{"text": text} for text in texts], texts, smoke=True)
    content = recipe(material, SHIPPED[0], {"steps": 3}, {"held_out_rows": 4, "max_length_tokens": 32}, {})
    rows = prepare_rows(content, folder / "data")
    return LoopSpec(str(material.student), str(material.teacher), rows, steps=3, batch_rows=4, threads=1, top_k=8)


def test_the_bare_loop_learns_from_the_rows_that_the_product_prepared(tiny: LoopSpec) -> None:
    trace = train(tiny)
    assert len(trace.times) == len(trace.tokens) == 3
    assert min(trace.tokens) > 0
    assert trace.losses[-1] < trace.losses[0]


@pytest.mark.parametrize("setup", SHIPPED + ALTERNATIVES, ids=lambda setup: setup.name)
def test_every_setup_is_a_recipe_that_the_product_takes(tiny: LoopSpec, setup: Setup) -> None:
    material = Material(Path("rows.jsonl"), Path(tiny.student), Path(tiny.teacher), {})
    run = load_job(recipe(material, setup, {"steps": 3}, {}, {})).run
    assert (run.train.workers, run.endpoints["teacher"].actors) == (setup.workers, setup.scorers)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_smoke_run_ends_with_its_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "train-vs-bare", "--smoke", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    sides = found["measured"]["rounds"]
    assert found["name"] == "train-vs-bare"
    assert found["measured"]["smoke"] is True
    assert sides["1 worker, 1 scorer"][0]["first_loss_difference"] < 1e-5
