"""The door for a teacher with another tokenizer: what it tells the stages, prints and refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from orchestrator import alignment, rollouts
from orchestrator.bundle import from_table, to_table
from orchestrator.checks import networks
from orchestrator.errors import Refusal
from orchestrator.foreign import ForeignReader
from orchestrator.pipeline import StageGroup, stage_groups
from orchestrator.plan import Plan, plan_text
from orchestrator.reading import prepared_rows
from orchestrator.rows import Rows
from strategies.stages.align import NONE, Align, ScoreAligned, alignments
from tests.orchestrator.bench import Bench, put
from tests.tokenizers import byte_level_bpe, sentencepiece


def planned(bench: Bench, strategy: str = "alm", teacher: str = "foreign", *overrides: str) -> Plan:
    bench.recipe["strategy"] = {"type": strategy}
    bench.recipe["endpoints"]["teacher"]["model"] = str(bench.folder / teacher)
    return bench.plan(*overrides)


def refused(bench: Bench, *overrides: str, teacher: str = "foreign") -> str:
    with pytest.raises(Refusal) as caught:
        planned(bench, "gold", teacher, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["alm", "uld", "gold"])
def test_a_teacher_with_another_tokenizer_is_planned_for_and_told_of(bench: Bench, strategy: str) -> None:
    plan = planned(bench, strategy)
    (found,) = plan.alignments
    assert found.endpoint == "teacher" and found.aligned > 0.9 and 0 < found.one_to_one < found.aligned
    assert found.expansion > 1 and found.shared > 300
    text = plan_text(plan)
    assert "bytes to learn lie in spans that" in text and "ids are shared by all" not in text
    (stage,) = alignments(plan.strategy.stages)
    assert isinstance(stage.reader, ForeignReader) and stage.reader.expansion == found.expansion
    assert plan.cast.foreign == {"teacher": 400} and plan.stream().usable("teacher") == 400
    assert plan.cast.vocabulary == plan.stream().usable("student") == 512
    asked = next(s for s in plan.strategy.stages if isinstance(s, ScoreAligned))
    marks = [
        plan.cast.tokenizer.convert_tokens_to_ids(t)
        for t in AutoTokenizer.from_pretrained(bench.folder / "foreign").convert_ids_to_tokens([0, 1, 2])
    ]
    assert list(asked.shared[:3]) == ([] if strategy == "alm" else marks)


def test_with_the_students_own_tokenizer_all_of_the_text_is_one_to_one(bench: Bench) -> None:
    (found,) = planned(bench, teacher="teacher").alignments
    assert found.aligned == found.one_to_one > 0.95 and found.ours == found.theirs == 1.0


def test_rows_are_as_long_as_the_teacher_reads_them(bench: Bench) -> None:
    plan = planned(bench)
    (stage,) = alignments(plan.strategy.stages)
    lengths = np.asarray([10, 64, 100_000])
    assert rollouts.read_rows(plan.strategy, "teacher", lengths).tolist() == alignment.read_rows(stage, lengths).tolist()
    assert alignment.read_rows(stage, lengths)[0] > 10 and alignment.read_rows(stage, lengths)[2] == 512
    assert alignment.read_rows(Align("x"), lengths).tolist() == lengths.tolist()


def test_more_kept_tokens_than_the_teacher_has_are_refused(bench: Bench) -> None:
    assert "400" in refused(bench, "strategy.top_k=401")
    assert planned(bench, "gold", "foreign", "strategy.top_k=400").alignments


def test_signals_across_tokenizers_are_not_stored(bench: Bench) -> None:
    assert "signals.mode" in refused(bench, "signals=store")


def test_a_teacher_without_a_tokenizer_is_refused(bench: Bench) -> None:
    bare = bench.copy("foreign", "bare")
    for file in bare.glob("token*"):
        file.unlink()
    message = refused(bench, teacher=str(bare))
    assert "endpoints.teacher" in message and "no tokenizer" in message


def test_a_strategy_on_the_students_tokens_still_refuses_another_tokenizer(bench: Bench) -> None:
    with pytest.raises(Refusal, match="need a strategy that aligns them"):
        planned(bench, "logits")
    bench.recipe["strategy"] = {"type": "alm", "student_share": 1.0, "max_new_tokens": 8, "base": "teacher"}
    with pytest.raises(Refusal, match="need a strategy that aligns them"):
        bench.plan()


def test_a_text_that_the_teacher_cannot_read_is_refused_as_noise(bench: Bench) -> None:
    lacking = bench.copy("foreign", "lacking")
    for file in lacking.glob("token*"):
        file.unlink()
    sentencepiece(fallback=False).save_pretrained(str(lacking))
    put("data.train", bench.rows(*({"text": f"中文字符 {i} 这是一个测试" * 4} for i in range(40))))(bench)
    message = refused(bench, teacher=str(lacking))
    assert "tokenizer of endpoint 'teacher'" in message and "at least 50%" in message


def test_other_chat_templates_are_no_obstacle_to_plain_text(bench: Bench) -> None:
    marked = bench.copy("foreign", "marked")
    tokenizer = AutoTokenizer.from_pretrained(marked)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(str(marked))
    plan = planned(bench, teacher=str(marked))
    assert not [w for w in plan.warnings if "chat template" in w]


def test_the_vocabulary_of_a_foreign_endpoint_does_not_bound_the_students(bench: Bench) -> None:
    plan = planned(bench)
    assert networks.Cast(plan.cast.student, plan.cast.tokenizer, {}, {}, 7, {"far": 9}).usable("far") == 9
    assert json.loads(plan.facts.to_json())["vocabulary"] == 512


PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
"""A template unlike the student's, whose turns end with a token of another name."""


def talking(bench: Bench, name: str) -> Path:
    """A teacher with BPE of its own, whose turns end with `<|eot|>`."""
    folder = bench.copy("foreign", name)
    for file in folder.glob("token*"):
        file.unlink()
    byte_level_bpe(400, template=PLAIN, turn="<|eot|>").save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("form", ["messages", "pairs", "turns"])
def test_conversations_are_shown_in_the_teachers_own_template(bench: Bench, form: str) -> None:
    asked = [[{"role": "user", "content": f"def f{i}(x)?"}] for i in range(40)]
    said = [[{"role": "assistant", "content": f"return x + {i}"}] for i in range(40)]
    rows: list[object] = [{"messages": a + s} for a, s in zip(asked, said, strict=True)]
    if form == "pairs":
        rows = [{"prompt": a, "completion": s} for a, s in zip(asked, said, strict=True)]
    if form == "turns":
        rows = [{"messages": a + s + a + s} for a, s in zip(asked, said, strict=True)]
    put("data.train", bench.rows(*rows))(bench)
    teacher = talking(bench, "talking")
    plan = planned(bench, "alm", str(teacher), "data.max_length_tokens=96")
    assert plan.alignments[0].aligned == 1.0
    (stage,) = alignments(plan.strategy.stages)
    theirs, ours = AutoTokenizer.from_pretrained(teacher), plan.cast.tokenizer
    columns = Rows(plan.data.folder, "train").read(np.arange(3))
    out = stage(columns, None)
    read = np.split(out["teacher/tokens"], np.cumsum(out["teacher/lengths"])[:-1])
    row = str(ours.decode(columns["tokens"][: columns["lengths"][0]].tolist()))
    number = row.partition("return x + ")[2].partition("<")[0]
    turn = f"[user]\ndef f{number}(x)?<|eot|>\n[assistant]\nreturn x + {number}<|eot|>"
    want = turn + ("\n" + turn if form == "turns" else "")
    assert str(theirs.decode(read[0].tolist())) == want
    assert (out["teacher/span"] != NONE).all()
    ends = theirs.convert_tokens_to_ids("<|eot|>")
    learnt = out["teacher/tokens"][out["teacher/loss_mask"] != 0]
    assert np.count_nonzero(learnt == ends) == (6 if form == "turns" else 3), "the end of a turn is learnt from the end of a turn"


@pytest.mark.parametrize("apart", [False, True])
def test_conversations_of_held_out_rows_are_found_too(bench: Bench, apart: bool) -> None:
    users, answers = ([[{"role": who, "content": f"f{i}"}] for i in range(40)] for who in ("user", "assistant"))
    rows = [{"prompt": user, "completion": answer} for user, answer in zip(users, answers, strict=True)]
    put("data.train", bench.rows(*rows))(bench)
    if apart:
        other = bench.storage.parent / "held_out.jsonl"
        other.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        put("data.held_out", str(other))(bench)
    plan = planned(bench, "alm", str(talking(bench, "talking")))
    (stage,) = alignments(plan.strategy.stages)
    columns = prepared_rows(plan.data.folder, np.arange(8) + plan.data.train.rows) | {"step": np.zeros(1, np.int64)}
    out = stage(columns, None)
    assert (out["teacher/span"] != NONE).all()
    ours, theirs = plan.cast.tokenizer, plan.cast.tokenizers["teacher"]
    for own, read in zip(_rows(columns["tokens"], columns["lengths"]), _rows(out["teacher/tokens"], out["teacher/lengths"]), strict=True):
        number = str(ours.decode(own)).partition("\nf")[2].partition("<")[0]
        assert str(theirs.decode(read)) == f"[user]\nf{number}<|eot|>\n[assistant]\nf{number}<|eot|>"


def _rows(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [r.tolist() for r in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_conversations_need_a_teacher_with_a_template(bench: Bench) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in range(40)]
    put("data.train", bench.rows(*rows))(bench)
    mute = bench.copy("foreign", "mute")
    tokenizer = AutoTokenizer.from_pretrained(mute)
    tokenizer.chat_template = None
    for file in (*mute.glob("token*"), *mute.glob("chat*")):
        file.unlink()
    tokenizer.save_pretrained(str(mute))
    assert "without a chat template" in refused(bench, teacher=str(mute))


def test_the_stages_travel_and_answer_in_a_process_of_the_teachers(bench: Bench) -> None:
    plan = planned(bench, "gold")
    (group,) = stage_groups(plan.stream().stages)
    there = pickle.loads(pickle.dumps(group))
    actor = StageGroup(there, plan.endpoints["teacher"], 1, plan.stream().usable("teacher"))
    columns = Rows(plan.data.folder, "train").read(np.arange(6)) | {"step": np.ones(1, np.int64)}
    out = from_table(actor(to_table(columns)))
    learnt = int(columns["loss_mask"].sum())
    assert len(out["teacher/span"]) == len(out["teacher/logprob"]) == learnt and len(out["teacher/ids"]) == 64 * learnt
    assert {"weights/shared", "weights/unshared", "weights/spans"} <= set(out) and "teacher/tokens" not in out
    first = np.diff(out["teacher/span"], prepend=-2) != 0
    assert (out["teacher/logprob"][first & (out["teacher/span"] != NONE)] < 0).all()
    assert out["teacher/ids"].max() < plan.cast.vocabulary and out["teacher/dropped_mass"].tolist() == [0.0]
