"""The door: every mistake is told where it is, what was got, what was expected and what to do, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import T5Config, ViTConfig

from jobs import cli
from orchestrator.errors import Refusal
from strategies.stages.support import SharedSupport
from tests.orchestrator.bench import (
    DEEPSPEED,
    ROWS,
    TEXT,
    WORKERS_2,
    Bench,
    both,
    bundles_of_a_tebibyte,
    cluster,
    data_of,
    edit,
    files,
    full_disk,
    machine_of,
    messages_with_another_template,
    other_ids,
    own_model,
    pickled,
    put,
    run_called,
    spoilt,
    storage_below_a_file,
    storage_of_another,
    without,
    without_program,
)

LORA = "student.lora.target_modules"


def terms(term: Any, **signals: Any) -> Callable[[Bench], None]:
    """A loss of one term on the teacher's `signals`, or on its top-k."""
    given = {"signals": {name: {"endpoint": "teacher", "take": take} for name, take in signals.items()}} if signals else {}
    return put("strategy", {"type": "terms", "terms": [term], **given})


def blended(term: Any) -> dict[str, Any]:
    """A loss of one term, which may read a blend of two top-k signals of the teacher."""
    members: dict[str, Any] = {name: {"endpoint": "teacher", "take": {"type": "topk", "top_k": k}} for name, k in (("a", 4), ("b", 8))}
    return {"type": "terms", "signals": members | {"both": {"blend": {"a": 0.5, "b": 0.5}}}, "terms": [term]}


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
    (
        "golden metric nobody measures",
        put("alarms", {"golden": "eval/cros_entropy"}),
        ["alarms.golden", "Did you mean 'eval/cross_entropy'"],
    ),
    (
        "proxy nobody measures",
        put("alarms.golden_versus_proxy", {"proxy": "loss/kl"}),
        ["alarms.golden_versus_proxy.proxy", "'loss/kl'", "rollout/reward", "Did you mean 'loss/kd'"],
    ),
    (
        "golden is the proxy",
        put("alarms", {"golden": "eval/forward_kl", "golden_versus_proxy": {"proxy": "eval/forward_kl"}}),
        ["alarms", "two metrics"],
    ),
    ("unknown alarm", put("alarms", {"repetitions": False}), ["alarms.repetitions", "Did you mean 'repetition'"]),
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
    ("too many CPUs", both(WORKERS_2, cluster(resources={"worker": {"cpus": 400}})), ["logical CPUs (worker 2 x 400", "at most"]),
    ("GPUs that are not there", cluster(resources={"worker": {"gpus": 99}}), ["99 GPUs", "worker 1 x 99", "at most the"]),
    ("too little memory", machine_of(memory=1 << 30), ["memory", "GiB", "at most the 1.0 GiB", "micro_batch_tokens"]),
    ("bundles beyond the object store", bundles_of_a_tebibyte, ["train.read_ahead_bundles", "object store"]),
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
    (
        "code of its own",
        spoilt("student", edit(model_type="own", auto_map={"AutoConfig": "own.C"})),
        ["code of its own", "trust_remote_code"],
    ),
    ("teacher of a smaller vocabulary", lambda b: put("endpoints.teacher.model", str(b.folder / "foreign"))(b), ["'teacher'", "ids"]),
    ("same size, other ids", spoilt("teacher", other_ids), ["tokenizer of endpoint 'teacher'", "2 tokens with other ids", "'a' is"]),
    ("fake teacher of few ids", put("endpoints.teacher", {"engine": "fake", "vocabulary": 9}), ["endpoint 'teacher'", "9 ids", "512"]),
    ("top_k beyond the vocabulary", put("strategy.top_k", 513), ["top_k", "got 513", "512 ids"]),
    ("undefined endpoint", put("strategy.teacher", "techer"), ["'techer'", "Did you mean 'teacher'", "endpoints.techer.model"]),
    (
        "nothing is learnt",
        both(put("strategy.kd_weight", 0), put("strategy.ce_weight", 0.0)),
        ["strategy.logits", "0 at every step"],
    ),
    # terms
    (
        "draws for a distribution",
        terms({"objective": "jsd"}, drawn="sampled"),
        ["'jsd'", "whole distributions", "'drawn'", "distill strategies terms"],
    ),
    (
        "a distribution for a token",
        terms({"objective": "reverse-kl-squared"}, near="topk"),
        ["log-probability of the given token", "'near'"],
    ),
    (
        "a blend for a token",
        put("strategy", blended({"objective": "reverse-kl-squared", "signal": "both"})),
        ["'reverse-kl-squared'", "log-probability of the given token", "'both'"],
    ),
    (
        "a warm token",
        terms({"objective": {"type": "reverse-kl-squared", "temperature": 2}}, near="per-token"),
        ["'reverse-kl-squared' at temperature 2", "temperature 1"],
    ),
    (
        "warm draws",
        terms({"objective": {"type": "forward-kl", "temperature": {"ramp": [2, 1]}}}, drawn="sampled"),
        ["'forward-kl' at temperature ramp", "temperature 1"],
    ),
    ("no signal named", terms({"objective": "jsd"}, one="topk", two="dense"), ["'jsd' to name its signal", "one of one, two", "got none"]),
    ("unknown signal", terms({"objective": "jsd", "signal": "techer"}), ["the signal 'techer'", "one of its signals"]),
    ("pairs of rows that come alone", terms({"objective": "simpo"}), ["'simpo'", "rows in pairs", "weights/simpo", "no preferences yet"]),
    ("k1", terms({"objective": "reverse-kl-k1"}), ["reverse-kl-k1 teaches nothing", "reverse-kl-policy-gradient"]),
    ("unknown objective", terms({"objective": "jds"}), ["strategy", "jds", "jsd"]),
    ("unscaled ends", terms({"objective": {"type": "jsd", "beta": {"ramp": [0, 1]}, "rescale": False}}), ["strategy", "rescale"]),
    ("float16 student", put("student.dtype", "float16"), ["student.dtype", "'float16'", "bfloat16"]),
    ("float16 as saved", both(spoilt("student", edit(dtype="float16")), put("student.dtype", "auto")), ["student.dtype", "'auto'"]),
    ("quantised on a CPU", put("endpoints.teacher.quantization", "int8"), ["endpoints.teacher.quantization", "without a GPU"]),
    ("flash attention on a CPU", put("student.attention", "flash_attention_2"), ["student.attention", "without a GPU"]),
    ("flash attention of a teacher", put("endpoints.teacher.attention", "flash_attention_2"), ["endpoints.teacher.attention"]),
    ("adapter without targets", put(LORA, ["nothing"]), [LORA, "'nothing'", "q_proj"]),
    ("adapter on the head", put(LORA, ["q_proj", "lm_head"]), [LORA, "lm_head", "all-linear"]),
]


def test_a_blend_of_top_k_answers_is_planned_for(bench: Bench) -> None:
    bench.recipe["strategy"] = blended({"objective": "forward-kl", "signal": "both"})
    plan = bench.plan()
    (support,) = (s for s in plan.strategy.stages if isinstance(s, SharedSupport))
    assert support.vocabulary == 512 and list(plan.measured) == ["a"]


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


def test_the_recipe_that_the_mistakes_were_made_in_is_fine(bench: Bench) -> None:
    plan = bench.plan()
    assert (plan.steps, plan.vocabulary, plan.warnings) == (4, 512, ())
    assert files(bench.storage) and {path.split("/")[0] for path in files(bench.storage)} == {"data"}


def command(bench: Bench, capsys: pytest.CaptureFixture[str], *words: str, verb: str = "plan") -> tuple[int, str]:
    """Exit code of the real command, and what it says."""
    recipe, place = bench.storage.parent / "recipe.yaml", bench.storage.parent / "ray.yaml"
    recipe.write_text(yaml.safe_dump(bench.recipe))
    place.write_text(yaml.safe_dump(bench.cluster))
    bench.patch.setattr(sys, "argv", ["distill", verb, str(recipe), "--cluster", str(place), *words])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).split())


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


def test_workers_do_not_share_a_gpu(bench: Bench) -> None:
    bench.cluster["resources"]["worker"]["gpus"] = 0.5
    with pytest.raises(Refusal, match="0.5 with 2 workers; expected whole GPUs"):
        bench.plan("train.workers=2", "train.layout=ddp")
