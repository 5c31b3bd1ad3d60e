"""One side of a head benchmark. `python -m tests.benchmarks.head_work SPEC ANSWER`.

Time is the median over runs of forward and backward together, the first run left out. Memory is exact and repeats to the
byte: every allocation and release that torch makes while one forward and backward run is read from its profiler, and the
peak of their running sum is taken. One block of the size of the `(V, D)` weight gradient is left out as long as it lives,
since every side must hold that one; a side that makes a second pays for it. What a library takes outside torch's allocator
(packing buffers of matrix products) is not in it; `resident_bytes` of a run before, the kernel's own peak of the process
over its size before, is given beside it and holds everything, the weight gradient as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from strategies.core import Objective, Progress, Term
from strategies.head import Head, TokenBatch, chunked_terms
from strategies.objectives.divergence import ForwardKL, ReverseKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.mixtures import JSD
from strategies.schedule import constant
from strategies.signals import TAIL_FLOOR, Hidden, Signal, TopK
from tests.benchmarks.figure import median
from tests.benchmarks.head import Answer, HeadSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOGIT_SPREAD = 2.0
"""Standard deviation of logits."""
STATUS = Path("/proc/self/status")


class Case:
    """Inputs of one case on the device, the same for every side of one seed."""

    def __init__(self, spec: HeadSpec):
        torch.manual_seed(spec.seed)
        size = LOGIT_SPREAD / spec.width**0.5
        self.tokens, self.vocabulary = spec.tokens, spec.vocabulary
        self.hidden = torch.randn(spec.tokens, spec.width, device=DEVICE, requires_grad=True)
        self.weight = torch.empty(spec.vocabulary, spec.width, device=DEVICE).normal_(0, size).requires_grad_()
        self.labels = torch.randint(spec.vocabulary, (spec.tokens,), device=DEVICE)
        self.teacher_hidden = torch.randn(spec.tokens, spec.width, device=DEVICE)
        self.teacher_weight = self.weight.detach()[:1] if "topk" in spec.side else self._teacher_weight(size)
        if "topk" in spec.side:
            weights = torch.rand(spec.tokens, spec.kept, device=DEVICE).add_(0.01)
            shares = 0.9 * weights / weights.sum(-1, keepdim=True)
            self.logprobs = shares.log().sort(descending=True).values
            first = torch.randint(spec.vocabulary, (spec.tokens, 1), device=DEVICE)
            apart = torch.arange(spec.kept, device=DEVICE) * (spec.vocabulary // spec.kept)
            self.ids = (first + apart) % spec.vocabulary

    def _teacher_weight(self, size: float) -> Tensor:
        """Not far from the student's own."""
        return self.weight.detach() + 0.3 * torch.empty_like(self.weight, requires_grad=False).normal_(0, size)


def chunked(case: Case, signal: Signal | None, *objectives: Objective) -> Tensor:
    """Mean over tokens of the sum of `objectives`, by the head."""
    named = {f"term{i}": objective for i, objective in enumerate(objectives)}
    terms = tuple(Term(n, o, constant(1.0), signal=None if o.reads == "nothing" else "teacher") for n, o in named.items())
    batch = TokenBatch(labels=case.labels, signals={} if signal is None else {"teacher": signal}, weights={})
    scales = dict.fromkeys(named, 1.0 / case.tokens)
    return chunked_terms(case.hidden, Head(case.weight), batch, terms, scales, Progress(0, 1)).loss


def top_k(case: Case) -> TopK:
    return TopK(case.ids, case.logprobs, "bucket")


def hidden(case: Case) -> Hidden:
    return Hidden(case.teacher_hidden, Head(case.teacher_weight))


def plain_top_k(case: Case) -> Tensor:
    """Whole logits, log-softmax, gathered; the tail as what is left of one."""
    log_q = (case.hidden @ case.weight.T).log_softmax(-1)
    inside = log_q.gather(-1, case.ids)
    q_tail = torch.log1p(-inside.exp().sum(-1))
    p, p_tail = case.logprobs.exp(), (1 - case.logprobs.exp().sum(-1)).clamp(min=TAIL_FLOOR)
    return ((p * (case.logprobs - inside)).sum(-1) + p_tail * (p_tail.log() - q_tail)).mean()


def plain_hidden(case: Case) -> Tensor:
    """Whole logits of both, log-softmax, and torch's own KL."""
    with torch.no_grad():
        log_p = (case.teacher_hidden @ case.teacher_weight.T).log_softmax(-1)
    log_q = (case.hidden @ case.weight.T).log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / case.tokens


def liger(case: Case, compiled: bool) -> Tensor:
    """Liger's chunked JSD with its default chunk; gradients are made in forward there, too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled)
    found: Tensor = loss(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.labels)
    return found


SIDES: dict[str, Callable[[Case], Tensor]] = {
    "chunked topk": lambda case: chunked(case, top_k(case), ForwardKL()),
    "chunked topk, three terms": lambda case: chunked(case, top_k(case), ForwardKL(), CrossEntropy(), ReverseKL()),
    "chunked hidden": lambda case: chunked(case, hidden(case), ForwardKL()),
    "chunked hidden, reverse": lambda case: chunked(case, hidden(case), ReverseKL()),
    "chunked hidden, jsd": lambda case: chunked(case, hidden(case), JSD(beta=0.5, rescale=False)),
    "plain topk": plain_top_k,
    "plain hidden": plain_hidden,
    "liger": lambda case: liger(case, compiled=False),
    "liger, compiled": lambda case: liger(case, compiled=True),
}


def measure(spec: HeadSpec) -> Answer:
    torch.set_num_threads(spec.threads)
    case = Case(spec)
    run = Run(case, SIDES[spec.side])
    if spec.what == "seconds":
        value, detail = seconds(run, spec.repeats)
    else:
        value, detail = peak_bytes(run, warm_up="compiled" in spec.side)
    assert case.hidden.grad is not None and case.weight.grad is not None
    return Answer(value, run.loss, (case.hidden.grad.norm().item(), case.weight.grad.norm().item()), detail)


class Run:
    """Forward and backward of one side, whose gradients are left on the inputs."""

    def __init__(self, case: Case, side: Callable[[Case], Tensor]):
        self.case, self.side, self.loss = case, side, 0.0

    def forget(self) -> None:
        self.case.hidden.grad = self.case.weight.grad = None

    def __call__(self) -> None:
        loss = self.side(self.case)
        loss.backward()
        self.loss = loss.item()  # waits for an accelerator


def seconds(run: Run, repeats: int) -> tuple[float, dict[str, Any]]:
    """Median of `repeats` runs after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        run.forget()
        _wait()
        started = time.perf_counter()
        run()
        _wait()
        taken.append(time.perf_counter() - started)
    return median(taken[1:]), {"first_run": taken[0], "runs": taken[1:]}


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(run: Run, warm_up: bool) -> tuple[float, dict[str, Any]]:
    """`warm_up` runs once before, for a side that compiles."""
    for _ in range(warm_up):
        run()
        run.forget()
    before = _resident(peak=False)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the kernel forgets the peak so far
    run()
    resident = _resident(peak=True) - before
    run.forget()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    with profile(activities=activities, profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    kinds = torch._C._autograd.DeviceType
    wanted = kinds.CUDA if DEVICE.type == "cuda" else kinds.CPU
    found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type() == wanted]
    sizes = [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]
    gradient = run.case.weight.numel() * run.case.weight.element_size()
    return peak_without(sizes, gradient), {
        "allocator_bytes": peak_without(sizes, 0),
        "resident_bytes": resident,
        "weight_gradient_bytes": gradient,
    }


def peak_without(sizes: list[int], block: int) -> float:
    """Peak of the running sum of allocations and (negative) releases, less one of `block` bytes while one is alive."""
    held, alive, peak = 0, 0, 0
    for size in sizes:
        held += size
        alive += (size == block) - (size == -block)
        peak = max(peak, held - (block if alive > 0 else 0))
    return float(peak)


def _resident(peak: bool) -> int:
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM" if peak else "VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(measure(HeadSpec.load(Path(sys.argv[1]))))), encoding="utf-8")
