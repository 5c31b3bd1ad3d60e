"""Text that teachers write: what is asked, what is refused at the door, what is kept, and what a student then trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.endpoints import make_engine
from cluster.storage import Folder
from cluster.stores.files import StoreFiles
from cluster.stores.texts import read_texts
from orchestrator.bundle import from_table
from orchestrator.display import Display
from orchestrator.errors import Refusal
from orchestrator.filling import Filling, fill, read_parts
from orchestrator.plan import Plan, plan_text
from orchestrator.rows import Rows
from tests.orchestrator.bench import Bench, both, data_of, put

PROMPTS = 30
TURNS = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "That is 3."}]
SEQ_KD = {"type": "seq-kd", "max_new_tokens": 12}
COT = {"type": "verified-cot", "max_new_tokens": 12, "samples": 3, "unfinished": "keep"}


def questions(count: int = PROMPTS) -> list[dict[str, Any]]:
    return [{"prompt": f"def f{i}(x):\n    return x", "completion": f" + {i}\n#### {i}"} for i in range(count)]


@pytest.fixture
def asking(bench: Bench) -> Bench:
    """Prompts with completions; parts of few prompts."""
    both(data_of(*questions()), put("strategy", dict(SEQ_KD)), put("text", {"part_prompts": 8}))(bench)
    bench.recipe["data"]["held_out_rows"] = 4
    return bench


def fill_here(job: Filling, only: int | None = None) -> None:
    """What `fill` does, in this process; only the first parts if `only` says so."""
    engine = make_engine(job.config, job.spec.key.vocabulary, threads=1)
    job.files.begin(job.spec)
    infos = []
    for table in read_parts(job.rows, job.spec.starts, range(job.spec.parts if only is None else only)):
        info, content = job.keep(job.stage(from_table(table), engine))
        job.files.keep(info, content)
        infos.append(info)
    if only is None:
        job.files.finish(infos, {})


def written(bench: Bench, *overrides: str) -> Plan:
    """The plan once everything is written."""
    for job in bench.plan(*overrides).writings():
        fill_here(job)
    return bench.plan(*overrides)


def ids_of(files: StoreFiles) -> list[tuple[int, int, list[int]]]:
    texts = [t for p in files.parts for t in read_texts(p.file, files.content(p))]
    return [(t.row_id, t.sample, t.tokens.tolist()) for t in texts]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The door


CASES: list[tuple[str, Callable[[Bench], None], list[str]]] = [
    (
        "nobody writes there",
        put("endpoints.teacher", {"engine": "store", "folders": []}),
        ["endpoints.teacher.engine", "'store'", "does not write"],
    ),
    ("unknown endpoint", put("strategy.teacher", "nobody"), ["'nobody'", "endpoints.nobody.model"]),
    ("no prompts", data_of(*[{"text": "a b c"}] * 20), ["data.train", "the columns text", "prompt or messages"]),
    ("judge without references", both(data_of(*[{"prompt": f"a {i}"} for i in range(30)]), put("strategy.judge", "numeric")), ["held_out"]),
    ("nothing to measure on", data_of(*[{"prompt": f"a {i}"} for i in range(30)]), ["data.held_out_rows", "0 prompts with a completion"]),
    (
        "a control that is its run",
        put("baseline", True),
        ["baseline: got true, for seq-kd", "the same run twice", "strategy=cross-entropy", "data.held_out"],
    ),
    ("no room", put("strategy.max_new_tokens", 64), ["data.max_length_tokens", "room for both"]),
    ("prompts too long", put("strategy.max_new_tokens", 62), ["no prompt to write for", "longer than"]),
    (
        "a pattern without regex",
        put("strategy.judge", {"type": "exact", "pattern": "x"}),
        ["strategy: judge", "pattern belongs to the type regex"],
    ),
]


@pytest.mark.parametrize(("change", "told"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_cannot_be_written_is_refused(asking: Bench, change: Callable[[Bench], None], told: list[str]) -> None:
    change(asking)
    with pytest.raises(Refusal) as refused:
        asking.plan()
    assert all(word in str(refused.value) for word in told), str(refused.value)


def test_a_judge_needs_references(asking: Bench, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(q) + "\n" for q in questions(4)))
    data_of(*[{"prompt": f"a {i}"} for i in range(30)])(asking)
    put("data.held_out", str(held_out))(asking)
    assert asking.plan().text is not None
    with pytest.raises(Refusal, match=r"strategy\.judge: got 'numeric', and no prompt with a reference"):
        asking.plan("strategy.judge=numeric")


def test_a_plan_checks_rows_of_the_greatest_length_before_anybody_writes(asking: Bench) -> None:
    plan = asking.plan()
    (job,) = plan.writings()
    assert plan.text is not None and plan.text.selected is None and job.spec.parts == 4
    assert plan.data.train.rows == PROMPTS - 4 and plan.data.train.loss_tokens == 12 * (PROMPTS - 4)
    text = " ".join(plan_text(plan).split())
    assert "26 prompts" in text and "is filled first, in 4 parts" in text and "stand-ins" in text and "greedily" in text
    assert not asking.storage.joinpath("text").exists()  # a plan writes nothing


# What is trained on


def test_a_student_sees_exactly_the_written_ids_and_the_held_out_completions(asking: Bench) -> None:
    plan = written(asking)
    assert plan.writings() == [] and plan.text is not None and plan.text.selected is not None
    kept = rows_of(plan.text.selected.rows_file)
    assert len(kept) == plan.data.train.rows == plan.text.selected.kept == PROMPTS - 4
    rows = Rows(plan.data.folder, "train")
    for number, row in enumerate(kept):
        columns = rows.read(np.asarray([number]))
        assert columns["tokens"].tolist() == row["tokens"] and columns["loss_mask"].tolist() == row["loss_mask"]
        prompt = row["tokens"][: row["loss_mask"].index(1)]
        assert plan.cast.tokenizer.decode(prompt) == row["prompt"]
        assert plan.cast.tokenizer.decode(row["tokens"][len(prompt) :], skip_special_tokens=True) == row["completion"]
    held_out = Rows(plan.data.folder, "held_out")
    measured = [plan.cast.tokenizer.decode(held_out.read(np.asarray([i]))["tokens"]) for i in range(len(held_out))]
    assert len(measured) == 4 and all("#### " in m for m in measured)
    assert not any(m.startswith(row["prompt"]) for m in measured for row in kept)


def test_messages_are_written_for_behind_the_generation_prompt(asking: Bench) -> None:
    talks = [{"messages": [{"role": "user", "content": f"Add {i} and 2."}, TURNS[1]]} for i in range(20)]
    data_of(*talks)(asking)
    plan = written(asking, "strategy.temperature=1")
    assert plan.text is not None and plan.text.selected is not None
    row = rows_of(plan.text.selected.rows_file)[0]
    prompt = plan.cast.tokenizer.decode(row["tokens"][: row["loss_mask"].index(1)])
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n") and prompt.startswith("<|im_start|>user\nAdd ")
    stop = plan.text.stores[0].authored.write.sampling.stop
    assert plan.cast.tokenizer.convert_ids_to_tokens(list(stop)) == ["<|endoftext|>", "<|im_end|>"]


def test_prompts_are_written_for_once(asking: Bench) -> None:
    data_of(*questions(), *questions())(asking)
    plan = asking.plan()
    assert plan.text is not None
    assert plan.text.prompts.rows == PROMPTS - 4 and plan.text.prompts.left_out == {"the same prompt as before": PROMPTS}


def test_prompts_of_a_held_out_source_are_not_written_for(asking: Bench, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(q) + "\n" for q in questions(6)))
    put("data.held_out", str(held_out))(asking)
    plan = asking.plan()
    assert plan.text is not None
    assert plan.text.prompts.rows == PROMPTS - 4 and plan.text.prompts.left_out == {"held out too": 4}


def test_the_judge_keeps_what_is_right_and_lists_the_rest_without_asking_again(asking: Bench) -> None:
    put("strategy", dict(COT))(asking)
    plan = written(asking, "strategy.judge=none")
    assert plan.text is not None and plan.text.selected is not None
    texts = rows_of(plan.text.selected.rows_file)
    assert len(texts) == 3 * (PROMPTS - 4)
    first = {t["prompt"]: t["completion"] for t in texts if t["sample"] == 0}
    data_of(*[{**q, "answer": f"<{first.get(q['prompt'], '')}>"} for q in questions()])(asking)
    asking.recipe["strategy"]["judge"] = {"type": "regex", "pattern": r"(?s)\A<?(.*?)>?\Z"}
    judged = asking.plan()
    assert judged.writings() == [] and judged.text is not None and judged.text.selected is not None
    selected = judged.text.selected
    kept, rejected = rows_of(selected.rows_file), rows_of(selected.rejected_file)
    assert len(kept) + len(rejected) == selected.written == len(texts)
    assert {r["sample"] for r in kept} == {0} and all(r["correct"] for r in kept)
    assert selected.rejected == {"wrong answer": len(rejected)} and {r["reason"] for r in rejected} == {"wrong answer"}


def test_duplicates_go_and_a_prompt_keeps_as_many_as_it_may(asking: Bench) -> None:
    put("strategy", {**COT, "temperature": 0, "judge": "none"})(asking)
    plan = written(asking)
    assert plan.text is not None and plan.text.selected is not None
    assert plan.text.selected.kept == PROMPTS - 4 and plan.text.selected.rejected == {"the same text as before": 2 * (PROMPTS - 4)}
    capped = written(asking, "strategy.temperature=1", "strategy.per_prompt=2")
    assert capped.text is not None and capped.text.selected is not None
    assert capped.text.selected.kept == 2 * (PROMPTS - 4)
    dropped = asking.plan("strategy.temperature=1", "strategy.unfinished=keep")
    assert dropped.writings() == []
    with pytest.raises(Refusal, match="no text to learn from among"):
        asking.plan("strategy.unfinished=drop")


@pytest.mark.parametrize(
    "change", ["strategy.max_new_tokens=8", "strategy.samples=2", "strategy.sampling_seed=1", "endpoints.teacher.dtype=bfloat16"]
)
def test_what_texts_depend_on_makes_another_store(asking: Bench, change: str) -> None:
    written(asking)
    plan = asking.plan(change)
    assert len(plan.writings()) == 1 and plan.text is not None and "differs in" in plan.text.stores[0].nearest


@pytest.mark.parametrize("change", ["seed=4", "train.lr=1e-3", "strategy.unfinished=drop", "strategy.judge=exact"])
def test_what_they_do_not_depend_on_shares_it(asking: Bench, change: str) -> None:
    for job in asking.plan().writings():
        fill_here(job)
    try:
        assert asking.plan(change).writings() == []
    except Refusal as refused:  # nothing that a judge likes is left of random words
        assert "no text to learn from" in str(refused)


def test_only_missing_parts_are_written(asking: Bench) -> None:
    (job,) = asking.plan().writings()
    fill_here(job, only=2)
    (again,) = asking.plan().writings()
    assert [p.number for p in StoreFiles(again.files.folder).complete_parts()] == [0, 1]
    assert "has 2 of 4 parts" in plan_text(asking.plan())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_writes_what_this_process_would_and_only_what_is_missing(asking: Bench, tmp_path: Path) -> None:
    asking.cluster["address"] = "auto"
    (job,) = asking.plan("strategy.temperature=1").writings()
    elsewhere = replace(job, files=StoreFiles(Folder(str(tmp_path / "elsewhere"))))
    fill_here(elsewhere)
    fill_here(job, only=2)
    took = fill(job, Display())
    files = StoreFiles(job.files.folder)
    files.check()
    assert ids_of(files) == ids_of(elsewhere.files)  # log-probabilities round by the number of threads
    assert took.tokens == sum(p.loss_tokens for p in files.parts[2:])
    assert fill(job, Display()).tokens == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_student_learns_what_its_teacher_wrote_and_goes_on_with_it(asking: Bench) -> None:
    from orchestrator.comparison_rows import rows_of_recipe
    from orchestrator.generate import generate
    from orchestrator.run import distill

    asking.cluster["address"] = "auto"
    data_of(*[{**q, "answer": "x"} for q in questions()])(asking)
    asking.recipe["strategy"] = {**COT, "temperature": 1, "judge": {"type": "regex", "pattern": r"([a-z])"}}
    asking.recipe["name"] = "cot"
    first = generate(asking.recipe, cluster=asking.cluster)
    assert first.selected is not None and 0 < first.selected.kept < first.selected.written and first.texts[0].written_tokens > 0
    again = generate(asking.recipe, cluster=asking.cluster)
    assert again.texts[0].written_tokens == 0 and again.selected == first.selected
    result = distill(asking.recipe, cluster=asking.cluster)
    assert result.steps == 4 and result.metrics["eval/cross_entropy"] > 0
    chosen = rows_of_recipe(asking.storage / "cot" / "recipe.yaml", (), asking.cluster)
    plan = asking.plan("name=other")
    measured = Rows(plan.data.folder, "held_out")
    assert len(chosen.indices) == len(measured) == 4
    assert chosen.rows.read(chosen.indices)["tokens"].tolist() == measured.read(chosen.indices)["tokens"].tolist()


def test_damage_is_refused(asking: Bench) -> None:
    plan = written(asking)
    assert plan.text is not None
    (Path(plan.text.stores[0].files.folder.root) / "part-000001.arrow").unlink()
    with pytest.raises(Refusal, match=r"part-000001\.arrow: is missing"):
        asking.plan()
