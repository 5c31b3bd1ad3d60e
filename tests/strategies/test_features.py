"""Distances between inner states against float64 references: values, gradients, padding, packing and equal networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from strategies.core import Progress
from strategies.objectives import relations as relations_module
from strategies.objectives.features import GramMatrices, HiddenStates, Matched, gram_difference, hidden_cosine, hidden_mse
from strategies.objectives.relations import PARTS, Relations, relation_kl, relations
from strategies.taps import OUTPUT, Filter, Layer, Tap, Tapped
from tests.strategies import reference_features as reference

SEEDS = [0, 1, 2]
NOW = Progress(0, 10)
NARROW, WIDE, HEADS, LENGTH = 8, 12, 2, 7
INDEX = [2, 3, 5, 8, 9, 12]
"""Places of two sequences of 7 that predict loss tokens."""
LAST = Tap("hidden", Layer(depth=1.0))
LAST_PARTS = [Tap(part, Layer(depth=1.0)) for part in PARTS]
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5, 1.0])

Pair = Callable[[Tensor, Tensor], Tensor]
PAIRS: dict[str, tuple[Pair, Callable[[Any, Any], Any], int]] = {
    "mse": (hidden_mse, reference.mse, NARROW),
    "cosine": (hidden_cosine, reference.cosine, NARROW),
    "gram": (gram_difference, lambda a, b: reference.gram(a, b, [0] * len(a)), WIDE),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_the_formula(name: str, seed: int) -> None:
    function, formula, width = PAIRS[name]
    draw = np.random.default_rng(seed)
    mine, theirs, weights = draw.normal(size=(5, NARROW)), draw.normal(size=(5, width)), draw.random(5)
    given = torch.tensor(mine, requires_grad=True)
    found = function(given, torch.tensor(theirs))
    np.testing.assert_allclose(found.detach(), formula(mine, theirs), rtol=1e-10)
    (torch.tensor(weights) * found).sum().backward()
    np.testing.assert_allclose(given.grad, reference.slope(lambda x: float(weights @ formula(x, theirs)), mine), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", PAIRS)
def test_equal_states_are_at_distance_zero_with_gradient_zero(name: str) -> None:
    states = torch.randn(5, NARROW, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = PAIRS[name][0](states, states.detach())
    found.sum().backward()
    assert torch.equal(found, torch.zeros(5)) and torch.equal(states.grad, torch.zeros_like(states))


def test_states_without_a_direction_stay_finite() -> None:
    mine = torch.zeros(3, 4, requires_grad=True)
    theirs = torch.tensor([[0.0] * 4, [1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    found = hidden_cosine(mine, theirs)
    found.sum().backward()
    assert found.tolist() == [0.0, 0.5, 0.5] and torch.isfinite(mine.grad).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_relations_of_networks_of_unlike_widths_are_those_of_the_formula(seed: int) -> None:
    draw = np.random.default_rng(seed)
    mine, theirs = draw.normal(size=(LENGTH, NARROW)), draw.normal(size=(LENGTH, WIDE))
    row, places = [0, 0, 0, 1, 1, 1, 2], [1, 2, 4, 5, 6]
    allowed = torch.tensor([[j <= i and row[j] == row[i] for j in range(LENGTH)] for i in places])
    given = torch.tensor(mine, requires_grad=True)
    found = relation_kl(given, torch.tensor(theirs), torch.tensor(places), allowed, HEADS)
    np.testing.assert_allclose(found.detach(), reference.relation_kl(mine, theirs, places, row, HEADS), rtol=1e-9, atol=1e-12)
    found.sum().backward()
    expected = reference.slope(lambda x: float(reference.relation_kl(x, theirs, places, row, HEADS).sum()), mine)
    np.testing.assert_allclose(given.grad, expected, rtol=1e-5, atol=1e-8)
    assert found[-1] == 0.0  # a place alone in its row


def test_relations_do_not_see_a_rotation_inside_heads() -> None:
    draw = np.random.default_rng(0)
    states = draw.normal(size=(LENGTH, WIDE))
    rotations = [np.linalg.qr(draw.normal(size=(WIDE // HEADS, WIDE // HEADS)))[0] for _ in range(HEADS)]
    turned = np.concatenate([part @ r for part, r in zip(np.split(states, HEADS, -1), rotations, strict=True)], -1)
    places = torch.arange(LENGTH)
    allowed = places[None] <= places[:, None]
    before, after = (relations(torch.tensor(x), places, allowed, HEADS) for x in (states, turned))
    torch.testing.assert_close(before, after, rtol=1e-10, atol=1e-10)
    everywhere = np.linalg.qr(draw.normal(size=(WIDE, WIDE)))[0]
    assert not torch.allclose(before, relations(torch.tensor(states @ everywhere), places, allowed, HEADS))


def test_relations_have_the_right_gradient_in_double_precision() -> None:
    states = torch.randn(4, NARROW, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    theirs = torch.randn(4, WIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    places = torch.arange(4)
    assert torch.autograd.gradcheck(lambda x: relation_kl(x, theirs, places, places[None] <= places[:, None], HEADS), states)


@dataclass(frozen=True)
class Sides:
    """Student and teacher over two sequences, of which the second ends in padding."""

    student: Tapped
    teacher: Tapped


def sides(seed: int = 0, equal: bool = False) -> Sides:
    draw = np.random.default_rng(seed)

    def outputs(width: int) -> dict[Tap, Tensor]:
        return {t: torch.tensor(draw.normal(size=(2, LENGTH, width))).float().requires_grad_() for t in (LAST, OUTPUT, *LAST_PARTS)}

    mine = outputs(NARROW)
    theirs = mine if equal else outputs(WIDE)
    rows = torch.tensor([[0] * LENGTH, [1] * LENGTH])
    return Sides(*(Tapped(o, torch.tensor(INDEX), rows) for o in (mine, theirs)))


OBJECTIVES: dict[str, Any] = {
    "mse": HiddenStates(layers=(Layer(depth=1.0), "output")),
    "cosine": HiddenStates(distance="cosine"),
    "gelu": HiddenStates(filter="gelu-linear"),
    "gram": GramMatrices(),
    "relations": Relations(heads=HEADS, query_weight=0.5),
}


def widths(tapped: Tapped) -> dict[Tap, int]:
    return {tap: values.shape[-1] for tap, values in tapped.outputs.items()}


def filters_for(objective: Any, on: Sides) -> Mapping[str, Filter]:
    torch.manual_seed(0)
    made: Mapping[str, Filter] = objective.filters(widths(on.student), widths(on.teacher))
    return made


def total(name: str, on: Sides, weights: Tensor = WEIGHTS) -> Tensor:
    objective = OBJECTIVES[name]
    value: Tensor = objective.compare(on.student, on.teacher, filters_for(objective, on), weights, NOW)
    return value


def tokens(values: Tensor) -> Any:
    return values.detach().double().flatten(0, 1)[INDEX].numpy()


def by_formula(name: str, on: Sides) -> float:
    """The sum written out for each objective."""
    objective, weights = OBJECTIVES[name], WEIGHTS.double().numpy()
    filters = {k: f.weight.detach().double().numpy() for k, f in filters_for(objective, on).items()}
    mine, theirs = ({t: tokens(o) for t, o in side.outputs.items()} for side in (on.student, on.teacher))
    if name == "relations":
        found = 0.0
        for tap, scale in zip(LAST_PARTS, (0.5, 1.0, 1.0), strict=True):
            pairs = zip(on.student.outputs[tap].detach().double(), on.teacher.outputs[tap].detach().double(), strict=True)
            kl = [reference.relation_kl(a.numpy(), b.numpy(), range(LENGTH), [0] * LENGTH, HEADS) for a, b in pairs]
            found += scale * float(weights @ np.concatenate(kl)[INDEX])
        return found
    if name == "gram":
        return float(weights @ reference.gram(mine[OUTPUT], theirs[OUTPUT], [0, 0, 0, 1, 1, 1]))
    if name == "mse":
        parts = [reference.mse(mine[t] @ filters[str(i)].T, theirs[t]) for i, t in enumerate((LAST, OUTPUT))]
        return float(weights @ (parts[0] + parts[1]) / 2)
    if name == "cosine":
        return float(weights @ reference.cosine(mine[OUTPUT] @ filters["0"].T, theirs[OUTPUT]))
    bent = torch.nn.functional.gelu(torch.tensor(mine[OUTPUT])).numpy()
    return float(weights @ reference.mse(bent @ filters["0"].T, theirs[OUTPUT]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_is_the_weighted_sum_of_its_formula(name: str, seed: int) -> None:
    on = sides(seed)
    assert total(name, on).item() == pytest.approx(by_formula(name, on), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sums_add_up_over_tokens(name: str) -> None:
    on = sides()
    parts = [total(name, on, torch.where(torch.arange(len(INDEX)) == i, WEIGHTS, 0.0)).item() for i in range(len(INDEX))]
    assert sum(parts) == pytest.approx(total(name, on).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mse", "cosine", "gram", "relations"])
def test_the_same_network_is_at_distance_zero(name: str) -> None:
    value = total(name, sides(equal=True))
    assert value.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_student_gets_a_gradient_and_padding_gets_none(name: str) -> None:
    on = sides()
    total(name, on).backward()
    read = [on.student.outputs[tap] for tap in OBJECTIVES[name].taps.student]
    assert all(values.grad is not None and values.grad.abs().sum() > 0 for values in read)
    assert all(values.grad[1, 6:].abs().sum() == 0 for values in read)  # the last loss token is at place 5 of the second
    assert all(values.grad is None for values in on.teacher.outputs.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_stands_in_the_padding_does_not_matter(name: str) -> None:
    on = sides()
    before = total(name, on).item()
    with torch.no_grad():
        for values in (*on.student.outputs.values(), *on.teacher.outputs.values()):
            values[1, 6:] = 1e3
    assert total(name, on).item() == before


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_tokens_and_no_weights_give_zeros(name: str) -> None:
    on = sides()
    none = Sides(*(replace(side, index=side.index[:0]) for side in (on.student, on.teacher)))
    assert total(name, none, WEIGHTS[:0]).item() == 0.0
    value = total(name, on, torch.zeros(len(INDEX)))
    value.backward()
    assert value.item() == 0.0
    assert not any(v.grad is not None and v.grad.abs().sum() for v in on.student.outputs.values())


@pytest.mark.parametrize("name", ["gram", "relations"])
def test_rows_in_one_sequence_are_blind_to_each_other(name: str) -> None:
    """Two rows as two sequences, and as one sequence of twice the length."""
    apart = sides()

    def joined(side: Tapped) -> Tapped:
        return Tapped({t: o.flatten(0, 1)[None] for t, o in side.outputs.items()}, side.index, side.rows.flatten()[None])

    assert total(name, Sides(joined(apart.student), joined(apart.teacher))).item() == pytest.approx(total(name, apart).item(), rel=1e-5)


def test_relations_taken_piece_by_piece_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = sides(), sides()
    expected = total("relations", whole)
    expected.backward()
    monkeypatch.setattr(relations_module, "NUMBERS_AT_ONCE", HEADS * LENGTH * 2)
    value = total("relations", pieces)
    value.backward()
    torch.testing.assert_close(value, expected)
    for tap in LAST_PARTS:
        torch.testing.assert_close(pieces.student.outputs[tap].grad, whole.student.outputs[tap].grad)


def test_a_filter_learns() -> None:
    on = sides()
    objective = OBJECTIVES["mse"]
    filters = filters_for(objective, on)
    adam = torch.optim.Adam([p for f in filters.values() for p in f.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        adam.zero_grad()
        loss = objective.compare(on.student, on.teacher, filters, torch.ones(len(INDEX)), NOW)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_filter_that_keeps_the_width_starts_as_the_identity() -> None:
    states = torch.randn(3, 5)
    assert torch.equal(Filter(5, 5)(states), states)
    assert Filter(5, 5, gelu=True)(states).shape == Filter(5, 5)(states).shape
    torch.manual_seed(0)
    assert Filter(400, 30)(torch.randn(50, 400)).std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("layer", "layers", "number"),
    [
        ({"number": 3}, 4, 3),
        ({"number": 0}, 4, 0),
        ({"number": -1}, 4, 4),
        ({"number": -4}, 4, 1),
        ({"depth": 1.0}, 4, 4),
        ({"depth": 0.5}, 4, 2),
        ({"depth": 0.5}, 5, 3),
        ({"depth": 0.01}, 5, 1),
    ],
)
def test_layers_are_found_by_number_or_by_depth(layer: dict[str, Any], layers: int, number: int) -> None:
    assert Layer(**layer).of(layers) == number


@pytest.mark.parametrize("number", [5, -5])
def test_a_layer_that_is_not_there_is_named(number: int) -> None:
    with pytest.raises(ValueError, match=f"layer number {number}: got a network of 4 layers"):
        Layer(number=number).of(4)


@pytest.mark.parametrize("given", [{}, {"number": 1, "depth": 0.5}, {"depth": 0.0}, {"depth": 1.5}])
def test_a_layer_is_named_once_and_within_the_network(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Layer(**given)


def test_layers_are_matched_as_a_recipe_writes_them() -> None:
    given = {"layers": ["output", {"depth": 0.5}, {"student": {"number": 1}, "teacher": {"number": 3}}]}
    objective = HiddenStates.model_validate(given)
    assert objective.layers == ("output", Layer(depth=0.5), Matched(student=Layer(number=1), teacher=Layer(number=3)))
    assert objective.taps.teacher == (OUTPUT, Tap("hidden", Layer(depth=0.5)), Tap("hidden", Layer(number=3)))
    assert HiddenStates.model_validate_json(objective.model_dump_json()) == objective


def test_widths_that_cannot_be_compared_are_refused() -> None:
    on = sides()
    with pytest.raises(ValueError, match="width 8 and 12: expected equal widths"):
        filters_for(HiddenStates(filter="none"), on)
    with pytest.raises(ValueError, match="query at depth 1: got width 8; expected a multiple of the 3 relation heads"):
        filters_for(Relations(heads=3), on)
    with pytest.raises(ValidationError):
        HiddenStates(layers=())


def test_one_layer_is_enough() -> None:
    assert [str(t) for t in HiddenStates.model_validate({"layers": [{"depth": 0.5}]}).taps.student]


def test_gram_matrices_of_bfloat16_states_are_made_in_float32() -> None:
    on = sides()
    with torch.no_grad():
        narrow = Sides(*(replace(s, outputs={t: o.bfloat16() for t, o in s.outputs.items()}) for s in (on.student, on.teacher)))
    assert total("gram", narrow).item() == pytest.approx(by_formula("gram", narrow), rel=1e-5)
