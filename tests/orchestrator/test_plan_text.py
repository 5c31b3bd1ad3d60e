"""What a checked run is told with: warnings, estimates, the plan as a person reads it; and strategies of somebody else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from jobs.strategies import show_strategies
from orchestrator.plan import plan_text
from strategies.core import Columns, Endpoint, Player, Strategy, Term, lm_update
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from strategies.sources import TakeTopK, Taught
from tests.orchestrator.bench import WORKERS_2, Bench, both, cluster, gpus, machine_of, other_template, own_model, put, spoilt


def twin(bench: Bench) -> None:
    put("endpoints.teacher.model", bench.recipe["student"]["model"])(bench)


def other_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}))


WARNINGS: list[tuple[str, Callable[[Bench], None], str]] = [
    ("teacher is the student", twin, "the very weights"),
    ("other end of text", spoilt("teacher", other_eos), "EOS is 0 ('<|endoftext|>') for the student and 2 ('<|im_end|>')"),
    ("other template, plain text", spoilt("teacher", other_template), "another chat template"),
    ("no tokenizer", spoilt("teacher", lambda f: [p.unlink() for p in f.glob("*token*")]), "no tokenizer beside its model"),
    ("unused endpoint", put("endpoints.other", {"model": "x/y"}), "'other' of the recipe is used by no stage"),
    ("one term never counts", put("strategy.ce_weight", 0), "'ce' has weight 0 throughout"),
    ("bfloat16 weights", put("student.dtype", "bfloat16"), "rounds away small updates"),
    ("period never reached", put("evaluate.every_steps", 9), "evaluate.every_steps=9 is longer than the run"),
    ("golden measured once", put("alarms.golden", "eval/cross_entropy"), "alarms.golden is measured 1 times and its alarm wants 10"),
    ("defined in two files", lambda b: b.cluster.update(endpoints=b.recipe["endpoints"]), "in ray_config.yaml and in the recipe"),
    ("baseline of itself", both(put("strategy", "cross-entropy"), put("endpoints", {}), put("baseline", True)), "no teacher"),
    ("idle GPUs", gpus(2), "take none of the 2 GPUs here"),
    ("batch smaller than its workers", both(WORKERS_2, put("train.batch_tokens", 36)), "less than a row for each of 2 workers"),
]


@pytest.mark.parametrize(("spoil", "words"), [w[1:] for w in WARNINGS], ids=[w[0] for w in WARNINGS])
def test_what_may_be_meant_otherwise_is_said(bench: Bench, spoil: Callable[[Bench], None], words: str) -> None:
    machine_of()(bench)
    spoil(bench)
    plan = bench.plan()
    assert [w for w in plan.warnings if words in w], plan.warnings
    assert words.split()[0] in plan_text(plan)


def test_padded_vocabularies_of_one_family_share_the_smaller(bench: Bench) -> None:
    put("endpoints.teacher.model", str(bench.folder / "padded"))(bench)
    assert bench.plan().vocabulary == 512
    both(put("student.model", str(bench.folder / "padded")), put("endpoints.teacher.model", str(bench.folder / "teacher")))(bench)
    plan = bench.plan()
    assert plan.vocabulary == 512 and plan.stream().vocabulary == 512 and plan.cast.student.vocabulary == 640


def test_a_negative_weight_is_a_weight(bench: Bench) -> None:
    assert bench.plan("strategy.ce_weight=-0.2", "strategy.kd_weight=1.2").warnings == ()


def test_an_absolute_position_model_passes_the_door(bench: Bench) -> None:
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    both(own_model(config), put("student.init", "random"))(bench)
    plan = bench.plan()
    assert plan.cast.student.context == 64 and plan.memory[0].parts["activations"] > 0


def test_a_cluster_elsewhere_is_not_measured_by_this_machine(bench: Bench) -> None:
    both(WORKERS_2, cluster(resources={"worker": {"cpus": 400, "gpus": 8}}, address="10.0.0.1:6379"))(bench)
    assert bench.plan().shares["worker"].gpus == 8


@dataclass(frozen=True)
class Halfway:
    """A stage that reads a column nobody adds, or does not add what it says."""

    needs: frozenset[str] = frozenset()
    adds: frozenset[str] = frozenset()
    endpoint: str | None = None

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        return columns


CE = Term("ce", CrossEntropy(), constant(1.0))
GOOD = Strategy(players={"student": Player()}, updates=(lm_update(CE),))


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (replace(GOOD, stages=(Halfway(needs=frozenset({"grade"})),)), ["stage Halfway", "no column 'grade'", "tokens"]),
        (replace(GOOD, stages=(Halfway(adds=frozenset({"grade"})),)), ["stage Halfway", "no column 'grade' after it ran"]),
        (replace(GOOD, signals={"ghost": Taught(TakeTopK(), endpoint="ghost")}), ["'ghost/ids'", "no stage adds"]),
        (replace(GOOD, updates=(lm_update(replace(CE, signal="ghost")),)), ["'ce'", "signal 'ghost'"]),
        (replace(GOOD, updates=(lm_update(CE, CE),)), ["terms named ce, ce"]),
        (replace(GOOD, updates=(lm_update(CE, player="critic"),)), ["player 'critic'", "student"]),
    ],
)
def test_a_strategy_whose_parts_do_not_meet_is_refused(bench: Bench, strategy: Strategy, words: list[str]) -> None:
    said = bench.refusal_of(strategy)
    assert [word for word in words if word not in said] == [], said


def test_the_strategy_that_the_readme_writes_is_found_when_it_is_installed_and_plans(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[2] / "strategies" / "README.md").read_text("utf-8")
    code, project = (re.findall(rf"```{kind}\n(.+?)```", readme, re.DOTALL)[0] for kind in ("python", "toml"))
    points = tomllib.loads(project)["project"]["entry-points"]["distill.strategies"]
    for name, text in {
        "mine/reverse_logits.py": code,
        "mine-1.dist-info/METADATA": "Name: mine\nVersion: 1\n",
        "mine-1.dist-info/entry_points.txt": "[distill.strategies]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    bench.patch.syspath_prepend(tmp_path)
    show_strategies("reverse-logits")
    assert "Weight of the reverse KL." in capsys.readouterr().out
    put("strategy", "reverse-logits")(bench)
    assert bench.plan().strategy.updates[0].player == "student"


def test_the_plan_fits_a_hundred_columns_and_names_everything(bench: Bench) -> None:
    put("data.train", bench.rows(*[{"text": "[/bold] odd [markup] " * 3 + str(i)} for i in range(30)], {"text": 3}))(bench)
    put("endpoints.teacher.model", str(bench.folder / "padded"))(bench)
    plan = bench.plan("name=readable", "checkpoint.every_steps=1", "strategy.kd_weight={ramp: [0.1, 0.9]}")
    said = plan_text(plan)
    paths = (str(bench.folder), str(bench.storage.parent))
    assert [line for line in said.splitlines() if len(line) > 100 and not any(p in line for p in paths)] == []
    ids = " ".join(str(i) for i in plan.data.first_row.tokens[:4])
    for word in (
        "readable",
        "kd = 0.1 to",
        "640",
        "1 of 31 records",
        "text is not a string",
        "reader",
        "checkpoints 4 x",
        ids,
        "[/bold] odd",
    ):
        assert word in " ".join(said.split()), word
    assert set(plan.fingerprints) == {"data", "student", "tokenizer", "endpoints.teacher", "endpoints.teacher.answers", "signals.teacher"}


def test_planning_leaves_heavy_packages_alone(bench: Bench) -> None:
    """DeepSpeed compiles when it is imported, and MLflow takes seconds."""
    code = "import sys, orchestrator.plan; print(sorted({'deepspeed', 'mlflow', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not torch.cuda.is_initialized()
