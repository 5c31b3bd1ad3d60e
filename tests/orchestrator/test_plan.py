"""The door: every mistake is told where it is, what was got, what was expected and what to do, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2Config, T5Config, ViTConfig

from jobs import cli
from orchestrator import plan as plans
from orchestrator.checks import machine, resumed
from orchestrator.config import Job, load_job
from orchestrator.errors import Refusal
from orchestrator.plan import make_plan, plan_text
from strategies import StrategyConfig
from strategies.core import Columns, Endpoint, Player, Strategy, Term, lm_update
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from tests.tiny import tiny_model, tiny_tokenizer

Recipe = dict[str, Any]
ROWS = 40
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

    def plan(self, *overrides: str) -> plans.Plan:
        return make_plan(self.job(*overrides), "tiny")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, width, words, seed in (("student", 32, 512, 0), ("teacher", 48, 512, 1), ("padded", 32, 640, 2)):
        tiny_model(folder / name, vocab_size=words, width=width, seed=seed)
        tiny_tokenizer(folder / name)
    tiny_model(folder / "foreign", vocab_size=400)
    tiny_tokenizer(folder / "foreign", vocab_size=400)
    lines = [json.dumps({"text": TEXT.format(i) * 2}) for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def bench(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = {
        "student": {"model": str(models / "student")},
        "strategy": {"type": "logits", "top_k": 8},
        "data": {"train": str(models / "rows.jsonl"), "held_out_rows": 8, "max_length_tokens": 64},
        "train": {"steps": 4, "batch_rows": 8, "layout": {"type": "single"}},
        "endpoints": {"teacher": {"model": str(models / "teacher")}},
    }
    return Bench(models, recipe, {"storage": str(tmp_path / "runs"), "resources": {"worker": {"cpus": 0.1}}}, monkeypatch)


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
LORA = "student.lora.target_modules"

CASES: list[tuple[str, Callable[[Bench], None], list[str]]] = [
    # the recipe's own words
    ("unknown key", put("train.batch_row", 8), ["train.batch_row", "Did you mean 'batch_rows'"]),
    ("wrong type", put("train.lr", "fast"), ["train.lr", "'fast'", "number"]),
    ("unknown strategy", put("strategy.type", "logit"), ["strategy.type", "'logit'", "Did you mean 'logits'"]),
    ("name with slashes", put("name", "a/b"), ["name", "'a/b'", "storage"]),
    ("name of the storage's own", put("name", "data"), ["name", "'data'", "Choose another"]),
    ("run finished", run_called("old", True), ["name", "a finished run", "choose another name"]),
    ("run unfinished", run_called("old", False), ["an unfinished run", "distill run --resume", "old"]),
    ("baseline's folder in use", both(run_called("old-baseline", True), put("name", "old"), put("baseline", True)), ["old-baseline"]),
    ("both lengths", put("train.epochs", 2), ["train", "both steps=4 and epochs=2", "exactly one"]),
    ("no length", put("train.steps", None), ["neither of steps and epochs"]),
    ("warm-up too long", put("train.warmup_steps", 4), ["train.warmup_steps", "less than the 4 steps"]),
    ("fewer rows than workers", both(WORKERS_2, put("train.batch_rows", 1)), ["train.batch_rows", "1 rows for 2 workers", "at least 2"]),
    ("rows that do not divide", both(WORKERS_2, put("train.batch_rows", 9)), ["a multiple of 2", "train.batch_rows=8 or 10"]),
    ("batch below the longest row", put("train.batch_tokens", 5), ["train.batch_tokens", "got 5", "longest row"]),
    ("metric nobody measures", put("checkpoint.best_metric", "eval/loss"), ["checkpoint.best_metric", "eval/cross_entropy"]),
    ("tracking in a folder", cluster(mlflow={"tracking_uri": "./mlruns"}), ["mlflow.tracking_uri", "a folder", "sqlite:///"]),
    ("tracking scheme", cluster(mlflow={"tracking_uri": "htp://host"}), ["scheme 'htp'", "Did you mean 'http'"]),
    ("tracking without host", cluster(mlflow={"tracking_uri": "http:///x"}), ["mlflow.tracking_uri", "'http:///x'"]),
    ("sqlite with two slashes", cluster(mlflow={"tracking_uri": "sqlite://runs.db"}), ["three slashes"]),
    # layouts and machine
    ("several workers of one", put("train.workers", 2), ["train.layout", "'single' with 2 workers", "train.layout=ddp"]),
    ("stage for another layout", put("train.layout.zero_stage", 3), ["train.layout.zero_stage", "does not read it", "deepspeed"]),
    ("offload for another layout", put("train.layout.offload_optimizer", True), ["train.layout.offload_optimizer", "does not read it"]),
    (
        "offload without a sharded optimizer",
        both(DEEPSPEED, put("train.layout.zero_stage", 0), put("train.layout.offload_optimizer", True)),
        ["offload_optimizer with zero_stage 0", "zero_stage=1"],
    ),
    ("layout's package missing", both(DEEPSPEED, without("deepspeed")), ["train.layout=deepspeed", "pip install deepspeed"]),
    ("no compiler", both(DEEPSPEED, without_program), ["train.layout=deepspeed", "no g++", "ninja"]),
    ("too many CPUs", both(WORKERS_2, cluster(resources={"worker": {"cpus": 400}})), ["800.6 logical CPUs", "worker 2 x 400", "at most"]),
    ("GPUs that are not there", cluster(resources={"worker": {"gpus": 99}}), ["99 GPUs", "worker 1 x 99", "at most the"]),
    ("too little memory", machine_of(memory=1 << 30), ["memory", "GiB", "at most the 1.0 GiB", "micro_batch_tokens"]),
    ("bundles beyond the object store", put("train.read_ahead_bundles", 10**8), ["train.read_ahead_bundles", "object store"]),
    ("full disk", full_disk, ["disk of", "KiB free", "checkpoints", "checkpoint.keep"]),
    ("storage below a file", storage_below_a_file, ["storage", "is a file", "ray_config.yaml"]),
    ("storage of somebody else", storage_of_another, ["storage", "may not be written"]),
    ("storage scheme", cluster(storage="s4://bucket/runs"), ["storage", "'s4://bucket/runs'", "s3://"]),
    # data
    ("missing data", put("data.train", "/nowhere/rows.jsonl"), ["data.train", "'/nowhere/rows.jsonl'", "Check the path"]),
    ("empty data", data_of(), ["data.train", "no records", "at least one"]),
    ("nothing held out", put("data.held_out_rows", 0), ["data.held_out_rows", "at least one row"]),
    ("everything held out", put("data.held_out_rows", ROWS), ["data.held_out_rows", "Set it lower"]),
    ("missing column", data_of({"txet": "a"}), ["columns txet", "'text'", "data.columns"]),
    ("too many bad rows", data_of(*[{"text": 1}] * 9, {"text": TEXT * 9}), ["9 bad records of 10", "data.max_bad_share", "listed in"]),
    ("held out from itself", lambda b: put("data.held_out", b.recipe["data"]["train"])(b), ["data.held_out", "data.train reads too"]),
    ("rows beyond the context", spoilt("student", edit(max_position_embeddings=16)), ["data.max_length_tokens=16", "student.model"]),
    ("rows beyond the teacher's", spoilt("teacher", edit(max_position_embeddings=8)), ["at most the 8", "endpoints.teacher.model"]),
    ("templates differ for messages", messages_with_another_template, ["messages", "'teacher'", "chat template", "prompt and completion"]),
    # networks
    ("missing model", put("student.model", "/nowhere/model"), ["'/nowhere/model'", "no such folder", "Check the path"]),
    ("hub out of reach", put("student.model", "no-such-owner-1/no-such-model-1"), ["no such folder", "hub", "connect"]),
    ("no config.json", spoilt("student", lambda f: (f / "config.json").unlink()), ["no config.json", "Point at the folder"]),
    ("not a causal LM", own_model(ViTConfig(hidden_size=8)), ["architecture 'vit'", "decoder-only"]),
    ("encoder and decoder", own_model(T5Config(d_model=8)), ["architecture 't5'", "decoder-only"]),
    ("pickled weights", spoilt("teacher", pickled), ["pickled weights only", "safetensors"]),
    ("code of its own", spoilt("student", edit(model_type="own", auto_map={"AutoConfig": "own.C"})), ["code of its own", "trust_remote_code"]),
    ("teacher of a smaller vocabulary", lambda b: put("endpoints.teacher.model", str(b.folder / "foreign"))(b), ["'teacher'", "ids"]),
    ("same size, other ids", spoilt("teacher", other_ids), ["tokenizer of endpoint 'teacher'", "2 tokens with other ids", "'a' is"]),
    ("fake teacher of few ids", put("endpoints.teacher", {"engine": "fake", "vocabulary": 9}), ["endpoint 'teacher'", "9 ids", "512"]),
    ("top_k beyond the vocabulary", put("strategy.top_k", 513), ["top_k", "got 513", "512 ids"]),
    ("undefined endpoint", put("strategy.teacher", "techer"), ["'techer'", "Did you mean 'teacher'", "endpoints.techer.model"]),
    ("nothing is learnt", both(put("strategy.kd_weight", 0), put("strategy.ce_weight", 0.0)), ["strategy.logits", "weight 0 at every step"]),
    ("float16 student", put("student.dtype", "float16"), ["student.dtype", "'float16'", "bfloat16"]),
    ("float16 as saved", both(spoilt("student", edit(dtype="float16")), put("student.dtype", "auto")), ["student.dtype", "'auto'"]),
    ("quantised on a CPU", put("endpoints.teacher.quantization", "int8"), ["endpoints.teacher.quantization", "without a GPU"]),
    ("flash attention on a CPU", put("student.attention", "flash_attention_2"), ["student.attention", "without a GPU"]),
    ("flash attention of a teacher", put("endpoints.teacher.attention", "flash_attention_2"), ["endpoints.teacher.attention"]),
    ("adapter without targets", put(LORA, ["nothing"]), [LORA, "'nothing'", "q_proj"]),
    ("adapter on the head", put(LORA, ["q_proj", "lm_head"]), [LORA, "lm_head", "all-linear"]),
]


@pytest.mark.parametrize(("spoil", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_mistake_is_refused_in_words_and_leaves_nothing(bench: Bench, spoil: Callable[[Bench], None], words: list[str]) -> None:
    spoil(bench)
    before = files(bench.storage)
    with pytest.raises(Refusal) as caught:
        bench.plan()
    refusal = caught.value
    assert [word for word in words if word not in str(refusal)] == [], str(refusal)
    assert all((refusal.where, refusal.got, refusal.expected, refusal.do)) and refusal.exit_code == 2
    assert len(str(refusal)) < 900 and "\n" not in str(refusal)
    assert {path for path in files(bench.storage) - before if path.split("/")[0] != "data"} == set()
    assert not any(".preparing" in path for path in files(bench.storage))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.is_dir() else set()


def test_the_recipe_that_the_mistakes_were_made_in_is_fine(bench: Bench) -> None:
    plan = bench.plan()
    assert (plan.steps, plan.vocabulary, plan.warnings) == (4, 512, ())
    assert files(bench.storage) and {path.split("/")[0] for path in files(bench.storage)} == {"data"}


def command(bench: Bench, capsys: pytest.CaptureFixture[str], *words: str, verb: str = "plan") -> tuple[int, str]:
    """Exit code and standard error of the real command."""
    recipe, place = bench.storage.parent / "recipe.yaml", bench.storage.parent / "ray.yaml"
    recipe.write_text(yaml.safe_dump(bench.recipe))
    place.write_text(yaml.safe_dump(bench.cluster))
    bench.patch.setattr(sys, "argv", ["distill", verb, str(recipe), "--cluster", str(place), *words])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_row=9", ["Refusal", "Did you mean 'batch_rows'"]),
        ("endpoints.teacher.quantization=int4", ["Refusal", "endpoints.teacher.quantization", "without a GPU"]),
        ("data.train=/nowhere.jsonl", ["Refusal", "/nowhere.jsonl", "Check the path"]),
    ],
)
def test_the_command_says_it_in_one_paragraph_and_exits_2(
    bench: Bench, capsys: pytest.CaptureFixture[str], override: str, words: list[str]
) -> None:
    code, said = command(bench, capsys, override)
    assert code == 2 and "Traceback" not in said
    assert [word for word in words if word not in said] == []
    assert not bench.storage.exists()


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), ("a: [1", "not YAML"), ("- 1", "a YAML mapping")])
def test_a_recipe_that_cannot_be_read_exits_2(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    bench.patch.setattr(sys, "argv", ["distill", "plan", str(path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and words in " ".join(capsys.readouterr().err.split())


def test_the_command_prints_a_good_plan(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = command(bench, capsys)
    assert code == 0
    for word in ("Student", "Qwen3ForCausalLM", "Score(teacher)", "held out: 8 rows", "logical", "GiB", "First row"):
        assert word in said


# Warnings: what may be meant otherwise.


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
    ("defined in two files", lambda b: b.cluster.update(endpoints=b.recipe["endpoints"]), "in ray_config.yaml and in the recipe"),
    ("baseline of itself", both(put("strategy", "cross-entropy"), put("endpoints", {}), put("baseline", True)), "no teacher"),
    ("batch smaller than its workers", both(WORKERS_2, put("train.batch_tokens", 34)), "less than a row for each of 2 workers"),
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


# Strategies of somebody else.


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
        (replace(GOOD, signals=("ghost",)), ["'ghost/ids'", "no stage adds"]),
        (replace(GOOD, updates=(lm_update(replace(CE, signal="ghost")),)), ["'ce'", "signal 'ghost'"]),
        (replace(GOOD, updates=(lm_update(CE, CE),)), ["terms named ce, ce"]),
        (replace(GOOD, updates=(lm_update(CE, player="critic"),)), ["player 'critic'", "student"]),
    ],
)
def test_a_strategy_whose_parts_do_not_meet_is_refused(bench: Bench, strategy: Strategy, words: list[str]) -> None:
    class Own(StrategyConfig):
        type: str = "own"

        def build(self) -> Strategy:
            return strategy

    job = bench.job()
    with pytest.raises(Refusal) as caught:
        make_plan(Job(run=job.run.model_copy(update={"strategy": Own(), "endpoints": {}}), cluster=job.cluster), "own")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


# Going on with a run.


def begun(bench: Bench, *overrides: str) -> plans.Plan:
    """A run's folder as the driver leaves it after its first moments."""
    from orchestrator.config import to_yaml
    from orchestrator.result import RECIPE

    plan = bench.plan("name=old", *overrides)
    plan.folder.write(RECIPE, to_yaml(plan.job.run).encode())
    plan.folder.write(plans.FACTS, plan.facts.to_json())
    return plan


@pytest.mark.parametrize(
    "override",
    ["train.workers=2", "train.max_failures=9", "endpoints.teacher.actors=2", "endpoints.teacher.resources.cpus=0.2", "tags.a=b"],
)
def test_a_run_goes_on_with_other_resources(bench: Bench, override: str) -> None:
    machine_of()(bench)
    before = begun(bench, "train.layout=ddp")
    after = make_plan(bench.job("train.layout=ddp", override), "recipe", resume=before.folder)
    assert (after.name, after.folder, after.done_steps) == ("old", before.folder, 0)
    assert after.fingerprints == before.fingerprints and "goes on from the start" in plan_text(after)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=0.1", ["train.lr = 0.1", "2e-05"]),
        ("strategy.top_k=4", ["strategy.top_k = 4", "8"]),
        ("train.steps=5", ["train.steps = 5"]),
        ("seed=3", ["seed = 3"]),
        ("endpoints.teacher.dtype=bfloat16", ["endpoints.teacher.dtype = 'bfloat16'"]),
        ("strategy=cross-entropy", ["strategy."]),
    ],
)
def test_a_run_does_not_go_on_as_another(bench: Bench, override: str, words: list[str]) -> None:
    before = begun(bench)
    with pytest.raises(Refusal) as caught:
        make_plan(bench.job(override), "recipe", resume=before.folder)
    assert [w for w in [*words, "start a new run"] if w not in str(caught.value)] == [], str(caught.value)


def changed_rows(bench: Bench) -> None:
    path = Path(bench.recipe["data"]["train"])
    path.write_text(path.read_text() + json.dumps({"text": TEXT}) + "\n")


def changed_teacher(bench: Bench) -> None:
    tiny_model(bench.recipe["endpoints"]["teacher"]["model"], width=48, seed=9)


@pytest.mark.parametrize(("change", "name"), [(changed_rows, "data"), (changed_teacher, "endpoints.teacher")])
def test_a_run_does_not_go_on_with_other_files(bench: Bench, change: Callable[[Bench], None], name: str) -> None:
    own = bench.copy("teacher", "own-teacher")
    rows = bench.rows(*[{"text": TEXT.format(i)} for i in range(30)])
    both(put("endpoints.teacher.model", str(own)), put("data.train", rows))(bench)
    before = begun(bench)
    change(bench)
    with pytest.raises(Refusal, match=f"another {name}"):
        make_plan(bench.job(), "recipe", resume=before.folder)


def test_a_layout_that_keeps_its_world_refuses_another(bench: Bench) -> None:
    machine_of()(bench)
    before = begun(bench, "train.layout=ddp")
    bench.patch.setattr(resumed, "layout_facts", lambda config: SimpleNamespace(resumes_any_world=False))
    with pytest.raises(Refusal, match=r"2 workers.*Set train.workers=1"):
        make_plan(bench.job("train.layout=ddp", "train.workers=2"), "recipe", resume=before.folder)


def test_a_finished_run_does_not_go_on(bench: Bench) -> None:
    before = begun(bench)
    before.folder.write("result.json", b"{}")
    with pytest.raises(Refusal, match="a finished run"):
        make_plan(bench.job(), "recipe", resume=before.folder)


def test_a_folder_without_a_recipe_is_no_run(bench: Bench, tmp_path: Path) -> None:
    before = begun(bench)
    os.remove(Path(before.folder.root) / "recipe.yaml")
    with pytest.raises(Refusal, match="without recipe.yaml"):
        make_plan(bench.job(), "recipe", resume=before.folder)


def test_the_plan_fits_a_hundred_columns_and_names_everything(bench: Bench) -> None:
    put("data.train", bench.rows(*[{"text": "[/bold] odd [markup] " * 3 + str(i)} for i in range(30)], {"text": 3}))(bench)
    put("endpoints.teacher.model", str(bench.folder / "padded"))(bench)
    plan = bench.plan("name=readable", "checkpoint.every_steps=1", "strategy.kd_weight={ramp: [0.1, 0.9]}")
    said = plan_text(plan)
    paths = (str(bench.folder), str(bench.storage.parent))
    assert [line for line in said.splitlines() if len(line) > 100 and not any(p in line for p in paths)] == []
    ids = " ".join(str(i) for i in plan.data.first_row.tokens[:4])
    for word in ("readable", "kd = 0.1 to", "640", "1 of 31 records", "text is not a string", "reader", "checkpoints 4 x", ids, "[/bold] odd"):
        assert word in " ".join(said.split()), word
    assert set(plan.fingerprints) == {"data", "student", "tokenizer", "endpoints.teacher"}


def test_planning_leaves_heavy_packages_alone(bench: Bench) -> None:
    """DeepSpeed compiles when it is imported, and MLflow takes seconds."""
    import subprocess

    code = "import sys, orchestrator.plan; print(sorted({'deepspeed', 'mlflow', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not torch.cuda.is_initialized()
