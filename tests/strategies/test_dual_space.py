"""Dual-space distillation against references in float64, and what it must be equal to where both networks speak alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.aligned import AlignedStates
from strategies.core import Progress, StatesTerm
from strategies.dual_space import DSKD
from strategies.head import Head
from strategies.objectives.divergence import forward_kl
from strategies.objectives.dual_space import DualSpace, StudentSpace, StudentSpaceTask, TeacherSpace
from strategies.sources import ForeignStates
from strategies.stages.align import ScoreAligned
from strategies.taps import OUTPUT, Filter, Tapped
from tests.strategies import reference_dual_space as exact

NOW = Progress(0, 10)
KINDS: dict[str, type[DualSpace]] = {
    "student-space-task": StudentSpaceTask,
    "student-space": StudentSpace,
    "teacher-space": TeacherSpace,
}
OURS, THEIRS = {"width": 6, "words": 9}, {"width": 8, "words": 11}
ROWS_Q, SPANS_Q = [0, 0, 0, 0, 1, 1, 1, 3, 3], [0, 0, 1, -1, 2, 3, 3, 4, 5]
ROWS_P, SPANS_P = [0, 0, 0, 1, 1, 1, 1, 3, 3], [0, 1, 1, 2, 2, 2, 3, 4, 5]
WEIGHTS = [1.0, 1.0, 0.5, 1.0, 1.0, 2.0, 2.0, 0.0, 0.7]
"""One token in no span, one span that counts for nothing, and a row 2 without loss tokens."""


def case(seed: int) -> dict[str, Tensor]:
    """The numbers of both sides in float64, as `reference_dual_space.spaces` names them; the teacher is often right."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    t: dict[str, Tensor] = {}
    for side, sizes, rows, spans in (("q", OURS, ROWS_Q, SPANS_Q), ("p", THEIRS, ROWS_P, SPANS_P)):
        t |= {f"h{side}": some(len(rows), sizes["width"]), f"head{side}": some(sizes["words"], sizes["width"])}
        t |= {f"e{side}": some(sizes["words"], sizes["width"])}
        t |= {f"{n}{side}": torch.randint(0, sizes["words"], (len(rows),), generator=draw) for n in ("reads", "labels")}
        t |= {f"rows{side}": torch.tensor(rows), f"spans{side}": torch.tensor(spans)}
    q, p = OURS["width"], THEIRS["width"]
    t |= {"t2s": some(q, p), "s2t": some(p, q), "query": some(2 * p, 2 * q), "w": torch.tensor(WEIGHTS, dtype=torch.float64)}
    return t


def sides(t: dict[str, Tensor]) -> tuple[Tapped, AlignedStates, dict[str, Filter], Tensor]:
    """The same in float32, as objectives see it. Tensors that learn are leaves."""
    f = {n: v.float() for n, v in t.items()}
    hidden, head = f["hq"].requires_grad_(), f["headq"].requires_grad_()
    student = Tapped(
        {OUTPUT: hidden[None]},
        torch.arange(len(hidden)),
        t["rowsq"][None],
        t["labelsq"],
        Head(head),
        t["readsq"],
        lambda ids: f["eq"][ids],
    )
    teacher = AlignedStates(
        outputs={OUTPUT: f["hp"][None]},
        index=torch.arange(len(f["hp"])),
        rows=t["rowsp"][None],
        labels=t["labelsp"],
        head=Head(f["headp"]),
        reads=t["readsp"],
        embed=lambda ids: f["ep"][ids],
        ours=t["spansq"],
        theirs=t["spansp"],
    )
    filters = {}
    for name in ("t2s", "s2t", "query"):
        filters[name] = Filter(t[name].shape[1], t[name].shape[0])
        filters[name].weight.data.copy_(f[name])
    return student, teacher, filters, f["w"]


def learnt(t: dict[str, Tensor], kind: str, alignment: str) -> tuple[float, dict[str, np.ndarray]]:
    """Value, and gradients of what has one."""
    student, teacher, filters, weights = sides(t)
    value = KINDS[kind](alignment=alignment).compare(student, teacher, filters, weights, NOW)  # type: ignore[arg-type,attr-defined]
    if value.requires_grad:
        value.backward()
    assert student.head is not None
    leaves = {"hq": student.outputs[OUTPUT]._base, "headq": student.head.weight, **{n: f.weight for n, f in filters.items()}}
    return value.item(), {n: leaf.grad.numpy() for n, leaf in leaves.items() if leaf is not None and leaf.grad is not None}


@pytest.mark.parametrize("alignment", ["attention", "exact"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_are_those_of_the_formula(seed: int, kind: str, alignment: str) -> None:
    t = case(seed)
    if kind == "student-space":  # the teacher's states say some of the tokens, and not others
        into, _ = exact.spaces(t, alignment == "exact")
        t["labelsq"] = torch.tensor([int((t["headq"] @ into[i]).argmax()) if i in into and i % 3 else 0 for i in range(len(t["hq"]))])
    leaves = {n: t[n].clone().requires_grad_() for n in ("hq", "headq", "t2s", "s2t", "query")}
    wanted = exact.PARTS[kind]({**t, **leaves}, alignment == "exact")
    wanted.backward()
    value, gradients = learnt(t, kind, alignment)
    assert wanted.item() > 0.1
    np.testing.assert_allclose(value, wanted.item(), rtol=2e-5)
    for name, leaf in leaves.items():
        expected = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        found = gradients.get(name, np.zeros(leaf.shape))
        np.testing.assert_allclose(found, expected, atol=3e-5 * max(1.0, np.abs(expected).max()), err_msg=name)


def alike(seed: int = 0, sharp: float = 1e4) -> dict[str, Tensor]:
    """Two networks with one tokenizer, one output head and filters that change nothing; attention picks the same token."""
    t = case(seed)
    count = len(t["hq"])
    t |= {n: t[f"{n[:-1]}q"] for n in ("headp", "ep", "rowsp")}
    t |= {"readsq": torch.arange(count) % 4, "labelsq": torch.arange(count)}
    t |= {"readsp": t["readsq"], "labelsp": t["labelsq"], "spansq": torch.arange(count), "spansp": torch.arange(count)}
    width = OURS["width"]
    t |= {"hp": torch.randn(count, width, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)}
    t |= {"t2s": torch.eye(width), "s2t": torch.eye(width), "query": sharp * torch.eye(2 * width), "w": torch.ones(count)}
    for side in "qp":  # of mean 0 and one size, so that each is nearest to itself
        e = t[f"e{side}"] - t[f"e{side}"].mean(-1, keepdim=True)
        t[f"e{side}"] = e / e.std(-1, keepdim=True)
    return {n: v.double() if v.is_floating_point() else v for n, v in t.items()}


@pytest.mark.parametrize("alignment", ["attention", "exact"])
def test_in_the_teachers_space_of_networks_that_speak_alike_it_is_the_forward_kl(alignment: str) -> None:
    t = alike()
    value, gradients = learnt(t, "teacher-space", alignment)
    hidden = t["hq"].clone().requires_grad_()
    wanted = forward_kl((hidden @ t["headp"].T).log_softmax(-1), (t["hp"] @ t["headp"].T).log_softmax(-1)).sum()
    wanted.backward()
    assert hidden.grad is not None
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(gradients["hq"], hidden.grad.numpy(), atol=2e-5)


def test_in_the_students_space_of_networks_that_speak_alike_it_is_the_forward_kl_where_the_teacher_is_right() -> None:
    t = alike()
    p = t["hp"] @ t["headq"].T
    right = torch.arange(len(p)) % 2 == 0
    t["labelsq"] = torch.where(right, p.argmax(-1), p.argmin(-1))
    t["labelsp"] = t["labelsq"]
    value, gradients = learnt(t, "student-space", "exact")
    hidden, head = t["hq"].clone().requires_grad_(), t["headq"].clone().requires_grad_()
    wanted = forward_kl((hidden @ head.T).log_softmax(-1), p.log_softmax(-1))[right].sum()
    wanted.backward()
    assert hidden.grad is not None and head.grad is not None
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(gradients["hq"], hidden.grad.numpy(), atol=2e-5)
    np.testing.assert_allclose(gradients["headq"], head.grad.numpy(), atol=2e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    t = alike()
    t["hp"] = t["hq"].clone()
    value, gradients = learnt(t, "teacher-space", "exact")
    assert abs(value) < 1e-6 and np.abs(gradients["hq"]).max() < 1e-6


@pytest.mark.parametrize("alignment", ["attention", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_counts_for_itself(kind: str, alignment: str) -> None:
    t = case(1)
    t["w"][0] = 1.0
    apart = 0.0
    for row in (0, 1, 3):
        one = dict(t) | {"w": torch.where(t["rowsq"] == row, t["w"], 0.0)}
        apart += learnt(one, kind, alignment)[0]
    assert learnt(t, kind, alignment)[0] == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize("alignment", ["attention", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_do_not_count_cost_nothing(kind: str, alignment: str) -> None:
    t = case(2) | {"w": torch.zeros(len(ROWS_Q), dtype=torch.float64)}
    value, gradients = learnt(t, kind, alignment)
    assert value == 0.0 and not any(g.any() for g in gradients.values())


def test_a_frozen_player_shows_no_spans() -> None:
    student, _, filters, weights = sides(case(0))
    with pytest.raises(ValueError, match="aligned spans"):
        TeacherSpace().compare(student, student, filters, weights, NOW)


def test_embeddings_of_another_width_are_no_keys() -> None:
    student, teacher, filters, weights = sides(case(0))
    with pytest.raises(ValueError, match="width 4 and outputs of width 6: expected one width"):
        narrow = replace(student, embed=lambda ids: torch.ones(len(ids), 4))
        TeacherSpace().compare(narrow, teacher, filters, weights, NOW)


def test_the_strategy_asks_for_states_and_shares_its_filters() -> None:
    strategy = DSKD(teacher="far", filters_lr=5e-3).build()
    (score,) = [s for s in strategy.stages if isinstance(s, ScoreAligned)]
    assert score.request.kind == "hidden" and strategy.signals == {"far": ForeignStates("far")}
    terms = [t for t in strategy.updates[0].terms if isinstance(t, StatesTerm)]
    assert [t.name for t in terms] == ["task", "student-space", "teacher-space"]
    assert {t.filters_name for t in terms} == {"spaces"} and {t.filters_lr for t in terms} == {5e-3}
    made = [t.objective.filters({OUTPUT: 3}, {OUTPUT: 5}) for t in terms]
    assert all({n: f.shape for n, f in m.items()} == {n: f.shape for n, f in made[0].items()} for m in made)
    assert set(made[0]) == {"t2s", "s2t", "query"}
    assert {getattr(s, "which", "one") for s in DSKD(alignment="exact").build().stages} == {"one"}
