"""Matrix products of the head: the same numbers by whichever library, at every edge of a tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies import products

ROWS, WIDTH, VOCABULARY = 6, 5, 23


@pytest.fixture(params=["as torch does", "as this machine does"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TILE_BYTES", 4 * ROWS * 8)
    if request.param == "as torch does":
        monkeypatch.setattr(products, "_onednn_is_faster", lambda: False)


def operands(rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,), (rows, VOCABULARY))
    states, weight, bias, by_logits = (torch.randn(shape, generator=draw) for shape in shapes)
    return states, weight, bias, by_logits


@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_go_where_they_are_told(library: None, rows: int, biased: bool) -> None:
    states, weight, bias, _ = operands(rows)
    out = torch.full((rows, VOCABULARY), torch.nan)
    assert products.times_transposed(states, weight, bias if biased else None, out) is out
    want = states.double() @ weight.double().T + (bias.double() if biased else 0.0)
    np.testing.assert_allclose(out.numpy(), want.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_gradients_of_states_go_where_they_are_told(library: None, rows: int) -> None:
    _, weight, _, by_logits = operands(rows)
    out = torch.full((rows, WIDTH), torch.nan)
    assert products.times(by_logits, weight, out) is out
    np.testing.assert_allclose(out.numpy(), (by_logits.double() @ weight.double()).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "faster", "tiles"), [(torch.float32, True, 3), (torch.float32, False, 0), (torch.bfloat16, True, 0)])
def test_onednn_makes_float32_products_tile_by_tile_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, faster: bool, tiles: int
) -> None:
    monkeypatch.setattr(products, "TILE_BYTES", 4 * ROWS * 8)
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: faster)
    made: list[int] = []

    def note(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append(len(weight))
        return torch.nn.functional.linear(states, weight, bias)

    monkeypatch.setattr(products, "_linear", note)
    states, weight, _, by_logits = (t.to(dtype) for t in operands())
    products.times_transposed(states, weight, None, torch.empty(ROWS, VOCABULARY, dtype=dtype))
    assert made == [8, 8, 7][:tiles]
    products.times(by_logits, weight, torch.empty(ROWS, WIDTH, dtype=dtype))
    assert len(made) == tiles + bool(tiles)


def test_tiles_stay_below_what_malloc_maps_anew() -> None:
    assert 1 << 20 < products.TILE_BYTES < 32 << 20


def test_weight_gradients_add_up_in_float32(library: None) -> None:
    states, weight, _, by_logits = operands()
    into = torch.ones_like(weight)
    products.add_product(into, by_logits, states)
    np.testing.assert_allclose(into.numpy(), 1 + (by_logits.double().T @ states.double()).numpy(), rtol=1e-5, atol=1e-5)
    products.add_product(into, by_logits.bfloat16(), states.bfloat16())
    assert into.dtype == torch.float32


def test_other_dtypes_are_left_to_torch(library: None) -> None:
    states, weight, bias, by_logits = (t.bfloat16() for t in operands())
    out = torch.empty(ROWS, VOCABULARY, dtype=torch.bfloat16)
    assert torch.equal(products.times_transposed(states, weight, None, out), states @ weight.T)
    assert torch.equal(products.times(by_logits, weight, states.clone()), by_logits @ weight)
    assert torch.equal(products.times_transposed(states, weight, bias, out), torch.addmm(bias, states, weight.T))
