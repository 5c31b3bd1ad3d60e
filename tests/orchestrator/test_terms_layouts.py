"""Five terms on five kinds of signal follow one independent curve under every layout, world size and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import harness_layouts as plain
from tests import harness_terms as harness
from tests.harness_layouts import ALONE, PAIR, Case
from tests.harness_terms import CASES
from tests.orchestrator.sides import Measured, run_sides
from tests.orchestrator.test_layouts import assert_same_curve, plain_logprobs, reference
from tests.tiny import tiny_model

# the first test starts the processes
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

STEPS = CASES[0].steps


def save_models(folder: Path) -> None:
    for name in ("tied", "untied"):
        tiny_model(folder / name, vocab_size=plain.VOCABULARY, width=16, tied=name == "tied")


def curve(folder: Path, case: Case) -> list[dict[str, float]]:
    return reference(folder, case, STEPS, plain_loss)[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Measured, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("terms_layouts")
    save_models(folder)
    wanted = {c.reference: c for c in CASES if c.precision == "float32"}
    with run_sides("tests.harness_terms", folder) as measured:
        curves = {name: curve(folder, case) for name, case in wanted.items()}
        yield measured(), curves


def plain_loss(model: torch.nn.Module, step: int) -> torch.Tensor:
    """Every term from whole distributions, by its formula, divided by the tokens that it weighs in the whole step."""
    columns = harness.whole_step(step)
    count = int(columns["loss_mask"].sum())
    log_q, log_p = plain_logprobs(model, columns), _numbers(columns, "whole/dense")
    q, p, b = log_q.exp(), log_p.exp(), harness.BETA
    m = b * p + (1 - b) * q
    jsd = (b * (p * (log_p - m.log())).sum(-1) + (1 - b) * (q * (log_q - m.log())).sum(-1)) / (b * (1 - b))
    labels = torch.from_numpy(columns["tokens"][columns["loss_mask"].astype(bool)]).long()
    own = log_q.gather(-1, labels[:, None])[:, 0]
    ce = -(1 - harness.SMOOTHING) * own - harness.SMOOTHING * log_q.mean(-1)
    ids = torch.from_numpy(columns["drawn/ids"].reshape(count, -1)).long()
    drawn = (log_p - log_q).gather(-1, ids).mean(-1)
    d = (log_p.gather(-1, labels[:, None])[:, 0] - own).detach()
    through = -_to_go(d, columns) * own
    terms = {
        "jsd": _weighed(jsd, columns, "jsd"),
        "drawn": drawn.sum() / count,
        "ce": _weighed(ce, columns, "ce"),
        "tv": 0.5 * (p - q).abs().sum() / count,
        "to-go": (-d.sum() + through.sum() - through.sum().detach()) / count,
    }
    return torch.stack([harness.WEIGHTS[name] * value for name, value in terms.items()]).sum()


def _numbers(columns: dict[str, Any], name: str) -> torch.Tensor:
    return torch.from_numpy(columns[name].reshape(int(columns["loss_mask"].sum()), -1))


def _weighed(values: torch.Tensor, columns: dict[str, Any], term: str) -> torch.Tensor:
    weights = torch.from_numpy(columns[f"weights/{term}"])
    return (weights * values).sum() / int((weights != 0).sum())


def _to_go(d: torch.Tensor, columns: dict[str, Any]) -> torch.Tensor:
    """Discounted sum of d from each loss token to the end of its row."""
    tokens = [int(part.sum()) for part in np.split(columns["loss_mask"], np.cumsum(columns["lengths"])[:-1])]
    parts = []
    for part in d.split(tokens):
        later = [harness.DISCOUNT ** torch.arange(len(part) - t) for t in range(len(part))]
        parts += [(part[t:] * by).sum() for t, by in enumerate(later)]
    return torch.stack(parts)


def named(*worlds: int) -> list[Any]:
    return [pytest.param(c, w, id=f"{c.name}-{w}") for c in CASES for w in worlds if w in c.worlds]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "world"), named(ALONE, PAIR))
def test_terms_follow_the_curve_of_a_plain_loop(results: Any, case: Case, world: int) -> None:
    measured, curves = results
    for rank in range(world):
        assert_same_curve(measured[world, rank][case.name]["steps"], curves[case.reference], case)


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("single")], ids=lambda c: c.name)
def test_one_process_follows_the_curve_of_a_plain_loop(tmp_path: Path, case: Case) -> None:
    save_models(tmp_path)
    expected = curve(tmp_path, case)
    assert_same_curve(harness.Side(tmp_path, 0, ALONE).measure(case)["steps"], expected, case)
    assert expected[-1]["loss"] < expected[0]["loss"]
