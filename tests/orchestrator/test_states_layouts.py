"""A student taught by inner states follows the curve of an independent loop under every layout, filters and checkpoint included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from orchestrator.models import load_student
from strategies.schedule import values_of
from tests import harness_features as harness
from tests import harness_layouts as plain
from tests.harness_features import AFTER, CASES, SAVED, SCALES, STEPS, only_states
from tests.harness_layouts import ALONE, PAIR, Case, merged
from tests.orchestrator.sides import Measured, run_sides
from tests.orchestrator.test_layouts import assert_same_curve, plain_rate
from tests.tiny import tiny_model

# the first test starts the processes
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Results:
    folder: Path
    measured: Measured
    curves: dict[str, list[dict[str, float]]]


def save_models(folder: Path) -> None:
    for name in ("tied", "untied"):
        tiny_model(folder / name, vocab_size=plain.VOCABULARY, width=16, tied=name == "tied")
    tiny_model(folder / "guide", vocab_size=plain.VOCABULARY, width=harness.GUIDE_WIDTH, layers=harness.GUIDE_LAYERS, seed=5)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    folder = tmp_path_factory.mktemp("features")
    save_models(folder)
    with run_sides("tests.harness_features", folder) as measured:
        curves = {kind(c): reference(folder, c) for c in reversed(CASES) if c.precision == "float32"}
        yield Results(folder, measured(), curves)


def kind(case: Case) -> str:
    """Which independent curve a case must follow."""
    return "lora" if case.lora else "states" if only_states(case) else "whole"


def reference(folder: Path, case: Case, count: int = STEPS) -> list[dict[str, float]]:
    """Plain training of student and filters on all rows of a step, row by row, with torch's AdamW."""
    run = plain.run_config(folder, case)
    model = load_student(run.student, gradient_checkpointing=False, seed=run.seed)
    guide = AutoModelForCausalLM.from_pretrained(folder / "guide")
    torch.manual_seed(run.seed)
    wide, narrow = harness.GUIDE_WIDTH, 16
    widths = [narrow] if only_states(case) else [narrow, narrow, narrow, wide]
    filters = [torch.nn.Parameter(torch.randn(wide, width) * width**-0.5) for width in widths]
    trained = [*dict.fromkeys(p for p in model.parameters() if p.requires_grad), *filters]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": run.train.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=run.train.betas, eps=run.train.eps, fused=False, foreach=False)
    steps = []
    for step in range(count):
        loss = plain_loss(model, guide, filters, harness.whole_step(step))
        loss.backward()
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        for p in trained:
            p.grad.mul_(min(1.0, run.train.clip_norm / (norm.item() + 1e-6)))
        for group in adamw.param_groups:
            group["lr"] = plain_rate(step, values_of(run.train.lr)[0], run.train.warmup_steps)
        adamw.step()
        adamw.zero_grad()
        steps.append({"loss": loss.item(), "grad_norm": norm.item()})
    return steps


def plain_loss(model: Any, guide: Any, filters: list[Tensor], columns: dict[str, Any]) -> Tensor:
    """All terms of a step from whole rows, each divided by the tokens that it weighs."""
    ends = np.cumsum(columns["lengths"])
    first, parts = 0, []
    for start, end in zip(ends - columns["lengths"], ends, strict=True):
        places = torch.from_numpy(np.flatnonzero(columns["loss_mask"][start:end]) - 1)
        mine = slice(first, first + len(places))
        if len(places):
            ids = torch.from_numpy(columns["tokens"][start:end]).long()[None]
            weights = {name: torch.from_numpy(columns[f"weights/{name}"][mine]) for name in ("ce", "hidden")}
            parts.append(_row(model, guide, filters, ids, places, weights, _teacher(columns, mine)))
        first += len(places)
    counts = {"ce": np.count_nonzero(columns["weights/ce"]), "hidden": np.count_nonzero(columns["weights/hidden"])}
    names = parts[0]
    return sum(SCALES[n] * sum(p[n] for p in parts) / counts.get(n, int(columns["loss_mask"].sum())) for n in names)


def _teacher(columns: dict[str, Any], mine: slice) -> tuple[Tensor, Tensor]:
    ids, logprobs = (columns[f"teacher/{n}"].reshape(-1, plain.TOP_K)[mine] for n in ("ids", "logprobs"))
    return torch.from_numpy(ids).long(), torch.from_numpy(logprobs)


def _row(
    model: Any, guide: Any, filters: list[Tensor], ids: Tensor, places: Tensor, weights: dict[str, Tensor], teacher: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Sums of the terms over one row; `hidden_states[l]` of transformers is what layer l wrote, the last one after the norm."""
    mine = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    with torch.no_grad():
        theirs = guide(input_ids=ids, output_hidden_states=True, use_cache=False)
    by_place = lambda states: states[0][places]  # noqa: E731
    gap = by_place(mine.hidden_states[1]) @ filters[0].T - by_place(theirs.hidden_states[2])
    found = {"hidden": (weights["hidden"] * (gap**2).mean(-1)).sum()}
    if len(filters) == 1:
        return found
    found["cosine"] = _cosine(by_place(mine.hidden_states[-1]) @ filters[1].T, by_place(theirs.hidden_states[-1]))
    found["relations"] = _relations(_vectors(model, mine), _vectors(guide, theirs), places)
    labels = ids[0][places + 1]
    kept = [torch.nn.functional.gelu(by_place(out.hidden_states[i + 1])) for i, out in enumerate((mine, theirs))]
    logits = [guide.lm_head(x.detach() @ f.T).log_softmax(-1) for x, f in zip(kept, filters[2:], strict=True)]
    found["task"] = -sum(x.gather(-1, labels[:, None]).sum() for x in logits)
    found["match"] = ((kept[0] @ filters[2].T - (kept[1] @ filters[3].T).detach()) ** 2).mean(-1).sum()
    log_q = mine.logits[0][places].log_softmax(-1)
    ids_kept, log_p = teacher
    rest = 1 - log_q.exp().gather(-1, ids_kept).sum(-1, keepdim=True)
    q = torch.cat([log_q.gather(-1, ids_kept), rest.log()], -1)
    p = torch.cat([log_p, torch.log1p(-log_p.exp().sum(-1, keepdim=True))], -1)
    found["kd"] = (p.exp() * (p - q)).sum()
    found["ce"] = -(weights["ce"] * log_q.gather(-1, labels[:, None])[:, 0]).sum()
    return found


def _cosine(mine: Tensor, theirs: Tensor) -> Tensor:
    """A row that starts with the padding token, whose embedding is zero, has a state without direction at its first place."""
    there = torch.stack([x.norm(dim=-1) > 0 for x in (mine, theirs)])
    gaps = 1 - torch.cosine_similarity(mine[there.all(0)], theirs[there.all(0)], dim=-1)
    return gaps.sum() + 0.5 * (there.sum(0) == 1).sum()


def _vectors(model: Any, out: Any) -> list[Tensor]:
    """Queries, keys and values of the last layer, from what it reads."""
    layer = (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers[-1]
    read = layer.input_layernorm(out.hidden_states[-2])[0]
    return [getattr(layer.self_attn, f"{n}_proj")(read) for n in "qkv"]


def _relations(mine: list[Tensor], theirs: list[Tensor], places: Tensor) -> Tensor:
    found = []
    for q, p in zip(mine, theirs, strict=True):
        both = []
        for x in (q, p):
            heads = x.view(len(x), harness.HEADS, -1).transpose(0, 1)
            scores = heads @ heads.transpose(1, 2) / heads.shape[-1] ** 0.5
            both.append(scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -1e30).softmax(-1)[:, places])
        found.append((both[1] * ((both[1] + 1e-30) / (both[0] + 1e-30)).log()).sum() / harness.HEADS)
    return torch.stack(found).sum()


def named(*worlds: int) -> list[Any]:
    return [pytest.param(c, w, id=f"{c.name}-{w}") for c in CASES for w in worlds if w in c.worlds]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "world"), named(ALONE, PAIR))
def test_every_layout_follows_the_curve_of_a_plain_loop(results: Results, case: Case, world: int) -> None:
    for rank in range(world):
        found = results.measured[world, rank][case.name]
        assert_same_curve(found["steps"], results.curves[kind(case)], case)
        assert_same_curve(found["again"], results.curves[kind(case)][SAVED : SAVED + AFTER], case)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "world"), named(PAIR))
def test_checkpoints_hold_the_filters_and_no_frozen_player(results: Results, case: Case, world: int) -> None:
    names = set(FileSystemReader(merged(results.folder, case, world)).read_metadata().state_dict_metadata)
    filters = {n for n in names if n.startswith("student.model.filters.")}
    expected = {"hidden/0"} if only_states(case) else {"hidden/0", "cosine/0", "ted/student0", "ted/teacher0"}
    assert filters == {f"student.model.filters.{n}.weight" for n in expected}
    assert not any(n.startswith("guide") for n in names)


def test_one_process_follows_the_curve_of_a_plain_loop(tmp_path: Path) -> None:
    save_models(tmp_path)
    case = Case("quick", "single", (ALONE,))
    found = harness.Side(tmp_path, 0, ALONE).measure(case)
    expected = reference(tmp_path, case)
    assert_same_curve(found["steps"], expected, case)
    assert found["again"] == found["steps"][SAVED : SAVED + AFTER]
    assert expected[-1]["loss"] < 0.95 * expected[0]["loss"]
