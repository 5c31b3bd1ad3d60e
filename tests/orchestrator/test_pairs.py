"""Rows that are compared stay together from the stage to the gradient, and the door knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from orchestrator.errors import Refusal
from orchestrator.memory import largest_work
from orchestrator.microbatch import MicroBatch, cut, dummy
from orchestrator.models import StudentModule
from orchestrator.order import Order
from orchestrator.plan import plan_text
from orchestrator.teachers import Teachers
from strategies.core import Columns, Progress, Term
from strategies.objectives.preference import DPO, pair_weights
from strategies.schedule import constant
from strategies.sources import TakePerToken, Taught
from strategies.stages.judge import loss_counts
from tests.orchestrator.bench import Bench
from tests.orchestrator.networks import VOCABULARY, network
from tests.prepared import write_split

TERM = Term("dpo", DPO(beta=0.7), constant(1.0), signal="base")
TEACHERS = Teachers({"base": Taught(TakePerToken(), endpoint="base")})


def pairs(lengths: list[int], prompt: int = 2) -> Columns:
    """Random rows, chosen and rejected in turn, with a random reference."""
    rng = np.random.default_rng(0)
    mask = np.concatenate([np.arange(n) >= prompt for n in lengths]).astype(np.uint8)
    columns: Columns = {
        "tokens": rng.integers(0, VOCABULARY, sum(lengths)).astype(np.int32),
        "lengths": np.asarray(lengths, dtype=np.int32),
        "loss_mask": mask,
        "base/logprob": rng.normal(-3, 1, int(mask.sum())).astype(np.float32),
    }
    return {**columns, "weights/dpo": pair_weights(loss_counts(columns))}


def learned(model: torch.nn.Module, micros: list[MicroBatch]) -> tuple[float, list[torch.Tensor]]:
    module = StudentModule(model, chunk_tokens=7)
    module.zero_grad()
    total = 0.0
    for micro in micros:
        loss, _, _ = module(TEACHERS.teach(micro, (TERM,)), (TERM,), {"dpo": 1.0}, Progress(0, 1))
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in module.parameters() if p.grad is not None]


def naive(model: Any, columns: Columns) -> torch.Tensor:
    """The sum over pairs, each row alone."""
    margins, start, first = [], 0, 0
    for length, count in zip(columns["lengths"].tolist(), loss_counts(columns).tolist(), strict=True):
        tokens = torch.from_numpy(columns["tokens"][start : start + length]).long()
        logits = model(input_ids=tokens[None]).logits[0, -count - 1 : -1].double()
        own = logits.log_softmax(-1).gather(-1, tokens[-count:, None]).sum()
        margins.append(own - float(columns["base/logprob"][first : first + count].sum(dtype=np.float64)))
        start, first = start + length, first + count
    return sum((-logsigmoid(0.7 * (c - r)) for c, r in zip(margins[::2], margins[1::2], strict=True)), torch.zeros(()))


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
@pytest.mark.parametrize("room", [24, 48, 400])
def test_every_cut_keeps_pairs_and_teaches_the_same(batching: Literal["bucketed", "packed"], room: int) -> None:
    columns, model = pairs([9, 14, 4, 3, 11, 5, 12, 12]), network("qwen3")
    micros = cut(columns, ["base/logprob"], batching, room, 30, together=2)
    assert len(micros) == {24: 4, 48: 3, 400: 1}[room] if batching == "bucketed" else micros
    got, gradients = learned(model, micros)
    want = naive(model, columns)
    model.zero_grad()
    want.backward()
    assert got == pytest.approx(want.item(), rel=2e-5)
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()) + 1e-9)


def test_a_rank_without_pairs_adds_nothing() -> None:
    got, gradients = learned(network("qwen3"), [dummy()])
    assert got == 0 and not any(g.any() for g in gradients)


def test_a_row_without_its_partner_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="runs of 2 rows"):
        cut(pairs([9, 14]) | {"lengths": np.asarray([23])}, ["base/logprob"], "bucketed", 30, 30, together=2)


def test_the_estimate_reads_pairs_in_one_forward(bench: Bench, tmp_path: Path) -> None:
    write_split(tmp_path, "train", np.asarray([40, 4] * 8))
    order = Order(str(tmp_path), seed=0, steps=1, bundles_per_step=1, batch_rows=16)
    run = bench.job("train.micro_batch_tokens=90").run

    def doubled(lengths: np.ndarray) -> np.ndarray:
        return np.stack([lengths, 44 - lengths], -1).flatten()

    assert largest_work(run, order, {}, 0, doubled).micros == 9
    assert largest_work(run, order, {}, 0, doubled, together=2).micros == 16


SODA = ("strategy=soda", "strategy.max_new_tokens=16")


def test_the_plan_says_who_writes_what_is_rejected(bench: Bench) -> None:
    plan = bench.plan(*SODA)
    said = " ".join(plan_text(plan).split())
    assert "Rollout(base) -> Score(base) -> PairWeights" in said
    assert "base writes up to 16 tokens after each prompt, beside the data's own text" in said
    assert "weights that the student starts from" not in said and "weight 0 throughout" not in said
    assert plan.freshness(None) is None and not plan.sources.captures
    assert "2 actors" in plan_text(bench.plan(*SODA, "endpoints.base={actors: 2}"))


def test_a_preference_without_a_reference_is_planned_for(bench: Bench) -> None:
    plan = bench.plan("strategy={type: soda, max_new_tokens: 16, without_reference: simpo}")
    assert "Rollout(base) -> PairWeights" in " ".join(plan_text(plan).split()) and not plan.measured


def test_fresh_weights_are_no_base(bench: Bench) -> None:
    with pytest.raises(Refusal, match="the endpoint 'base', which nothing defines"):
        bench.plan(*SODA, "student.init=random")
