"""Every layout trains the same student: the curve of an independent loop over full logits, at any world size and after a restart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from orchestrator.config import RunConfig
from orchestrator.errors import Refusal
from orchestrator.layouts import Numerics, make_layout
from orchestrator.microbatch import cut
from orchestrator.models import load_student
from strategies.core import Columns
from strategies.schedule import values_of
from strategies.sources import scored_columns
from tests import harness_layouts as harness
from tests.harness_layouts import AFTER, ALONE, CASES, HALF, PAIR, POISONED, STEPS, Case
from tests.orchestrator.sides import Measured, run_sides
from tests.tiny import tiny_model

# the first test starts the processes
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

EXACT = 1e-5
"""Largest relative difference of a step's loss or gradient norm in float32."""
ROUNDED = {"loss": 0.01, "grad_norm": 0.05}
"""The same where forwards and backwards run in bfloat16, whose own precision is 0.004."""


@dataclass(frozen=True)
class Results:
    folder: Path
    measured: Measured
    curves: dict[str, list[dict[str, float]]]
    """Of the independent loop, by name of the student."""
    half: dict[str, dict[str, torch.Tensor]]
    """Weights of the independent loop after the first half."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    folder = tmp_path_factory.mktemp("layouts")
    for name in ("tied", "untied"):
        tiny_model(folder / name, vocab_size=harness.VOCABULARY, width=16, tied=name == "tied")
    with run_sides("tests.harness_layouts", folder) as measured:
        curves, half = {}, {}
        for case in {c.reference: c for c in CASES if c.precision == "float32"}.values():
            curves[case.reference], half[case.reference] = reference(folder, case)
        yield Results(folder, measured(), curves, half)


def reference(
    folder: Path, case: Case, count: int = STEPS, loss_of: Callable[[torch.nn.Module, int], torch.Tensor] | None = None
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Plain training of one network on all rows of a step, row by row, with dense logits and torch's AdamW."""
    loss_of = loss_of or plain_loss
    run = harness.run_config(folder, case)
    model = load_student(run.student, gradient_checkpointing=False, seed=run.seed)
    trained = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    unique = list(dict.fromkeys(trained.values()))
    groups = [
        {"params": [p for p in unique if p.ndim > 1], "weight_decay": run.train.weight_decay},
        {"params": [p for p in unique if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=run.train.betas, eps=run.train.eps, fused=False, foreach=False)
    steps, half = [], {}
    for step in range(count):
        if step == HALF:
            half = {f"model.{n}": p.detach().clone() for n, p in trained.items()}
        adamw.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in unique if p.grad is not None]).norm()
        for group in adamw.param_groups:
            group["lr"] = plain_rate(step, values_of(run.train.lr)[0], run.train.warmup_steps)
        if norm.isfinite():
            for p in unique:
                p.grad.mul_(min(1.0, run.train.clip_norm / (norm.item() + 1e-6)))
            adamw.step()
        steps.append({"loss": loss.item(), "grad_norm": norm.item()})
    return steps, half


def plain_loss(model: torch.nn.Module, step: int) -> torch.Tensor:
    """0.9 of the mean forward KL on the teacher's tokens and a bucket for the rest, and 0.1 of the mean weighted cross-entropy."""
    columns = harness.whole_step(step)
    count = int(columns["loss_mask"].sum())
    ids = torch.from_numpy(columns["teacher/ids"].reshape(count, -1)).long()
    teacher = torch.from_numpy(columns["teacher/logprobs"].reshape(count, -1))
    log_q = plain_logprobs(model, columns)
    inside = torch.cat([teacher, torch.log1p(-teacher.exp().sum(-1, keepdim=True))], -1)
    rest = torch.log((log_q.exp() * torch.ones_like(log_q).scatter(-1, ids, 0.0)).sum(-1, keepdim=True))
    student = torch.cat([log_q.gather(-1, ids), rest], -1)
    kl = (inside.exp() * (inside - student)).sum()
    labels = torch.from_numpy(columns["tokens"][columns["loss_mask"].astype(bool)]).long()
    ce = -(torch.from_numpy(columns["weights/ce"]) * log_q.gather(-1, labels[:, None])[:, 0]).sum()
    return (0.9 * kl + 0.1 * ce) / count


def plain_logprobs(model: torch.nn.Module, columns: Columns) -> torch.Tensor:
    """`(N, V)` log-probabilities of all loss tokens of a step, from forwards of single rows."""
    ends = np.cumsum(columns["lengths"])
    logits = []
    for start, end in zip(ends - columns["lengths"], ends, strict=True):
        row = model(input_ids=torch.from_numpy(columns["tokens"][start:end]).long()[None], use_cache=False).logits[0].float()
        logits.append(row[:-1][torch.from_numpy(columns["loss_mask"][start + 1 : end].astype(bool))])
    return torch.cat(logits).log_softmax(-1)


def plain_rate(step: int, peak: float, warmup: int) -> float:
    """Straight up to the peak in `warmup` steps, then half a cosine down to nothing at the end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def assert_same_curve(steps: list[dict[str, float]], expected: list[dict[str, float]], case: Case) -> None:
    assert len(steps) == len(expected)
    for name in ("loss", "grad_norm"):
        bound = EXACT if case.precision == "float32" else ROUNDED[name]
        for number, (got, want) in enumerate(zip(steps, expected, strict=True)):
            if math.isfinite(want[name]):
                assert got[name] == pytest.approx(want[name], rel=bound), f"{case.name}: {name} of step {number}"
            else:
                assert not math.isfinite(got[name]) and got["skipped"] == 1.0, f"{case.name}: {name} of step {number}"


def named(*worlds: int, checkpoints: bool = False) -> list[Any]:
    """One parameter for each case and world size."""
    return [
        pytest.param(case, world, id=f"{case.name}-{world}")
        for case in CASES
        for world in worlds
        if world in case.worlds and (case.checkpoints or not checkpoints)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "world"), named(ALONE, PAIR))
def test_every_layout_follows_the_curve_of_a_plain_loop(results: Results, case: Case, world: int) -> None:
    for rank in range(world):
        expected = results.curves[case.reference][: case.steps_at(world)]
        assert_same_curve(results.measured[world, rank][case.name]["steps"], expected, case)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "world"), named(ALONE, PAIR, checkpoints=True))
def test_a_run_goes_on_from_the_checkpoint_of_another_world_size(results: Results, case: Case, world: int) -> None:
    for rank in range(world):
        assert_same_curve(results.measured[world, rank][case.name]["resumed"], results.curves[case.reference][HALF : HALF + AFTER], case)


@pytest.mark.slow
def test_a_single_process_goes_on_bit_for_bit(results: Results) -> None:
    found = results.measured[ALONE, 0]["single"]
    assert found["resumed"] == found["steps"][HALF : HALF + AFTER]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "world"), named(ALONE, PAIR, checkpoints=True))
def test_every_layout_stores_the_same_weights_under_the_same_names(results: Results, case: Case, world: int, tmp_path: Path) -> None:
    whole = harness.merged(results.folder, case, world)
    dcp_to_torch_save(whole, tmp_path / "whole.pt")
    stored = torch.load(tmp_path / "whole.pt", weights_only=False)["student"]["model"]
    expected = results.half[case.reference]
    assert {n: t.numel() for n, t in stored.items()} == {n: t.numel() for n, t in expected.items()}
    for name, weights in expected.items():
        bound = 1e-5 if case.precision == "float32" else 2e-2
        torch.testing.assert_close(
            stored[name].reshape(weights.shape), weights, rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "zero3", "zero3_untied", "fsdp2_untied"])
def test_a_rank_holds_only_its_shard_of_the_weights(results: Results, name: str) -> None:
    for rank in range(PAIR):
        found = results.measured[PAIR, rank][name]
        assert found["stored"] < 0.6 * found["whole"]
        assert found["held"]["parameters"] < 0.6 * found["whole"]
        assert found["held"]["optimizer"] < 1.7 * found["whole"]  # two moments, and ZeRO's own float32 weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload"])
def test_zero_shards_the_optimizer_alone_below_stage_three(results: Results, name: str) -> None:
    for rank in range(PAIR):
        found = results.measured[PAIR, rank][name]
        assert found["held"]["parameters"] >= found["whole"]
        assert found["held"]["optimizer"] < 1.7 * found["whole"]


@pytest.mark.slow
def test_the_ranks_had_unequal_work(results: Results) -> None:
    """What the other tests stand on: dummies happened, clipping was active, and one step was not finite."""
    steps = results.measured[PAIR, 0]["ddp"]["steps"]
    run = harness.run_config(results.folder, CASES[0])
    shares = [[_micro_batches(run, harness.bundle(step, part)) for part in range(PAIR)] for step in range(STEPS)]
    assert sum(first > second for first, second in shares) > 0.9 * STEPS
    assert sum(s["grad_norm"] > harness.CLIP_NORM for s in steps) > STEPS / 4
    assert [n for n, s in enumerate(steps) if s["skipped"]] == [POISONED]
    assert harness.bundle(7, 1)["loss_mask"].sum() == 0


def _micro_batches(run: RunConfig, columns: Columns) -> int:
    wanted = scored_columns(run.strategy.build().signals)
    return len(cut(columns, wanted, run.train.batching, run.train.micro_batch_tokens, run.data.max_length_tokens))


def test_one_process_follows_the_curve_of_a_plain_loop(tmp_path: Path) -> None:
    case = Case("quick", "single", (ALONE,), steps=12)
    tiny_model(tmp_path / "tied", vocab_size=harness.VOCABULARY, width=16)
    steps = harness.Side(tmp_path, 0, ALONE).measure(case)["steps"]
    assert_same_curve(steps, reference(tmp_path, case, case.steps)[0], case)


def test_offloading_without_sharding_is_refused(tmp_path: Path) -> None:
    case = Case("refused", "deepspeed", stage=0, offload=True)
    tiny_model(tmp_path / "tied", vocab_size=harness.VOCABULARY, width=16)
    layout = harness.run_config(tmp_path, case).train.layout
    numerics = Numerics(1.0, torch.float32, torch.device("cpu"))
    with pytest.raises(Refusal, match="zero_stage"):
        make_layout(layout, torch.nn.Linear(2, 2), lambda parameters: torch.optim.AdamW(parameters.values()), numerics)
