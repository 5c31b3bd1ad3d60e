"""The door for dual-space distillation and for units behind spans: what workers will hold, and who cannot give what they ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import TransformersEndpoint
from orchestrator.alignment import laid_bytes, units
from orchestrator.errors import Refusal
from orchestrator.frozen import load_ends
from orchestrator.layouts import LR_SHARE, set_rates
from orchestrator.plan_text import plan_text
from orchestrator.players import parameter_groups
from orchestrator.teachers import LaidStates, Teachers
from orchestrator.token_bytes import special_ids
from strategies.sources import ForeignStates
from strategies.stages.align import ScoreAligned
from strategies.taps import OUTPUT, Layer, Tap
from tests.orchestrator.bench import Bench, both, put

FOREIGN = {"model": "foreign"}


@pytest.fixture
def dual(bench: Bench) -> Bench:
    bench.recipe["strategy"] = {"type": "dskd"}
    bench.recipe["endpoints"]["teacher"]["model"] = str(bench.folder / "foreign")
    return bench


def test_a_plan_tells_what_a_worker_holds_of_a_teacher_in_its_own_tokens(dual: Bench) -> None:
    plan = dual.plan()
    teacher, student = plan.cast.teachers["teacher"], plan.cast.student
    assert list(plan.loaded) == ["teacher"] and not plan.frozen and not plan.measured
    worker = plan.memory[0]
    assert worker.parts["filters"] == 16 * (2 * student.hidden * teacher.hidden + 4 * student.hidden * teacher.hidden)
    tables = 1 if teacher.tied else 2
    assert worker.parts["teachers' heads"] == tables * 4 * 400 * teacher.hidden
    text = " ".join(plan_text(plan).split())
    assert "teacher-space = 1 x TeacherSpace of teacher" in text and "lie in spans that" in text
    exact = dual.plan("strategy.alignment=exact").memory[0].parts["filters"]
    assert exact == 16 * 2 * student.hidden * teacher.hidden


def test_states_count_among_what_travels_for_as_many_tokens_as_the_teacher_reads(dual: Bench) -> None:
    plan, light = dual.plan(), dual.plan("strategy={type: alm}")
    teacher, (found,) = plan.cast.teachers["teacher"], plan.alignments
    assert found.expansion > 1 and laid_bytes(plan.strategy, plan.cast, plan.alignments) >= 2 * 4 * teacher.hidden
    assert laid_bytes(light.strategy, light.cast, light.alignments) == 0
    assert plan.memory[0].parts["bundles"] > 8 * light.memory[0].parts["bundles"]


SERVER = {"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "x", "vocabulary": 400}
MISTAKES: dict[str, tuple[Callable[[Bench], None], list[str]]] = {
    "fake": (put("endpoints.teacher", {"engine": "fake", "vocabulary": 512}), ["endpoints.teacher", "no tokenizer"]),
    "server": (
        put("endpoints.teacher", SERVER),
        ["endpoints.teacher", "an engine without a network"],
    ),
    "stored": (put("signals", {"mode": "store"}), ["signals.mode", "auto or live"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_in_words(dual: Bench, name: str) -> None:
    spoil, words = MISTAKES[name]
    spoil(dual)
    teacher: Any = dual.recipe["endpoints"]["teacher"]
    dual.recipe["endpoints"]["teacher"] = teacher | ({"tokenizer": str(dual.folder / "foreign")} if "base_url" in teacher else {})
    with pytest.raises(Refusal) as refused:
        dual.plan()
    for word in words:
        assert word in str(refused.value)


def test_units_are_told_on_both_sides(bench: Bench) -> None:
    both(put("strategy", {"type": "alm", "debias": True}), put("endpoints.teacher.model", str(bench.folder / "foreign")))(bench)
    plan = bench.plan()
    (stage,) = [s for s in plan.strategy.stages if isinstance(s, ScoreAligned)]
    for tokenizer, ids in zip((plan.cast.tokenizer, plan.cast.tokenizers["teacher"]), stage.units, strict=True):
        begin = {i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith((" ", "\n", "\t", "\r"))}
        assert begin | special_ids(tokenizer) == set(ids) and begin
    assert units(plan.strategy) == stage.units[0]
    assert units(bench.plan("strategy.debias=false").strategy) == ()


def test_both_ends_of_a_teacher_are_loaded_over_all_of_its_ids(bench: Bench) -> None:
    config = TransformersEndpoint(model=str(bench.folder / "foreign"))
    ends = load_ends(config, torch.device("cpu"))
    assert len(ends.head.weight) == len(ends.embedding) == 400
    source = ForeignStates("teacher")
    teachers = Teachers.load({}, {"far": source}, {"teacher": config}, 7, False, torch.device("cpu"))
    assert not teachers.heads and list(teachers.shown) == ["far"] and len(teachers.foreign["far"].ends.head.weight) == 400
    laid = LaidStates("far", source, ends)
    assert laid.widths({OUTPUT}) == {OUTPUT: ends.embedding.shape[-1]}
    with pytest.raises(ValueError, match="its output alone"):
        laid.widths({Tap("hidden", Layer(number=1))})


def test_filters_may_have_a_learning_rate_of_their_own() -> None:
    named = {n: torch.nn.Parameter(torch.ones(2, 2)) for n in ("filters.spaces/t2s.weight", "filters.other/0.weight", "model.w")}
    named["model.b"] = torch.nn.Parameter(torch.ones(2))
    assert [len(g["params"]) for g in parameter_groups(named, 0.1, {})] == [3, 1]  # type: ignore[arg-type]
    groups = parameter_groups(named, 0.1, {"spaces": 5.0})
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_rates(optimizer, 0.01)
    found = {name: g["lr"] for g in optimizer.param_groups for name, p in named.items() if any(p is q for q in g["params"])}
    np.testing.assert_allclose([found[n] for n in named], [0.05, 0.01, 0.01, 0.01])
    assert [g.get(LR_SHARE) for g in groups] == [None, None, 5.0]
